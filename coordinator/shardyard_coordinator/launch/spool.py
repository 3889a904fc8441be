"""An attempt's events on disk: the supervisor appends, and anybody reads them by path once it is gone.

A record is 4 bytes of big-endian length, 4 bytes of CRC-32, then a serialised WorkerEvent. Records are dense: the n-th
is the event with sequence n. A torn or damaged record ends the file: what follows it was never acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

SPOOL_NAME = "spool.bin"
MAX_READ_BYTES = 8 * 1024 * 1024

_HEAD = struct.Struct(">II")


class Spool:
    """The writing side: one process, one event loop.

    Opening an existing file keeps its whole records, so that numbering goes on where a former supervisor stopped.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Where record n+1 begins is at index n; the last entry is the end of the file.
        self._offsets = array("Q", [0])
        for offset, payload in _records(path):
            self._offsets.append(offset + _HEAD.size + len(payload))
        os.ftruncate(self._fd, self._offsets[-1])

    @property
    def last(self) -> int:
        """The newest sequence; 0: there is none."""
        return len(self._offsets) - 1

    def append(self, events: Sequence[bytes]) -> None:
        """Adds events: they survive this process from here on, and the machine after `sync`."""
        blob = b"".join(_HEAD.pack(len(event), zlib.crc32(event)) + event for event in events)
        view = memoryview(blob)
        at = self._offsets[-1]
        while view:
            written = os.pwrite(self._fd, view, at)
            at += written
            view = view[written:]
        for event in events:
            self._offsets.append(self._offsets[-1] + _HEAD.size + len(event))

    async def sync(self) -> None:
        """Returns when all that was added is on disk."""
        await asyncio.get_running_loop().run_in_executor(None, os.fsync, self._fd)

    def read(self, after: int, limit: int) -> list[bytes]:
        """Up to `limit` events with a sequence over `after`, and not much over MAX_READ_BYTES of them."""
        stop = min(self.last, after + limit)
        if after >= stop:
            return []
        start = self._offsets[after]
        while stop > after + 1 and self._offsets[stop] - start > MAX_READ_BYTES:
            stop = after + (stop - after) // 2
        blob = os.pread(self._fd, self._offsets[stop] - start, start)
        ends = [self._offsets[n] - start for n in range(after, stop + 1)]
        return [blob[a + _HEAD.size : b] for a, b in itertools.pairwise(ends)]

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def read_spool(path: Path, after: int, limit: int | None = None) -> list[bytes]:
    """Events with a sequence over `after`, for when their supervisor is gone; empty where there is no file."""
    if not path.exists():
        return []
    events: list[bytes] = []
    for sequence, (_, payload) in enumerate(_records(path), start=1):
        if sequence <= after:
            continue
        if limit is not None and len(events) >= limit:
            break
        events.append(payload)
    return events


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and payload of each whole record from the beginning on."""
    with path.open("rb") as file:
        offset = 0
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, crc = _HEAD.unpack(head)
            payload = file.read(length)
            # No event is empty, but a page of zeros would pass for empty records.
            if not payload or len(payload) < length or zlib.crc32(payload) != crc:
                return
            yield offset, payload
            offset += _HEAD.size + length
