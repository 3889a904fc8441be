"""An attempt's events on disk: the supervisor appends them, and others read them by path once it is gone.

A record is 4 bytes of big-endian length, 4 bytes of CRC-32, then a serialised WorkerEvent. Records are dense: the n-th
is the event with sequence n. A torn or damaged record ends the file: what follows it was never acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
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

    Opening an existing file keeps its intact records: numbering continues where a former supervisor stopped. What
    is not known to be on the disk stays in memory, too: after a failed write or fsync it is written again.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Index n holds the offset of record n+1; the last entry is the end of the file, once all is written.
        self._offsets = array("Q", [0])
        for offset, payload in _records(path):
            self._offsets.append(offset + _HEAD.size + len(payload))
        os.ftruncate(self._fd, self._offsets[-1])
        # Records after `_safe`, as bytes of the file that begin there; the file has them up to `_written`.
        self._safe = self.last
        self._tail = bytearray()
        self._written = self._offsets[-1]

    @property
    def last(self) -> int:
        """The newest sequence; 0 if there is none."""
        return len(self._offsets) - 1

    @property
    def unsynced_bytes(self) -> int:
        """The bytes in memory that may not be on the disk: all since the last `sync`."""
        return len(self._tail)

    def append(self, events: Sequence[bytes]) -> None:
        """Adds events: from now on they survive this process, and after `sync` also the machine.

        Raises: OSError, and then none of them was added.
        """
        before = self.last
        self._add(events)
        try:
            self._write()
        except OSError:
            del self._tail[self._offsets[before] - self._offsets[self._safe] :]
            del self._offsets[before + 1 :]
            self._written = min(self._written, self._offsets[-1])
            raise

    def hold(self, events: Sequence[bytes]) -> None:
        """Adds events that can be read at once and are written as soon as possible."""
        self._add(events)
        with contextlib.suppress(OSError):
            self._write()

    async def sync(self) -> None:
        """Returns when all added events are on disk. Raises: OSError; then they are written again later."""
        self._write()
        upto = self.last
        try:
            await asyncio.get_running_loop().run_in_executor(None, os.fsync, self._fd)
        except OSError:
            # The kernel may have dropped the pages that it could not write, and would report success next time.
            self._written = self._offsets[self._safe]
            raise
        if upto > self._safe:
            del self._tail[: self._offsets[upto] - self._offsets[self._safe]]
            self._safe = upto

    def read(self, after: int, limit: int) -> list[bytes]:
        """Up to `limit` events with a sequence over `after`, and not much over MAX_READ_BYTES of them."""
        stop = min(self.last, after + limit)
        if after >= stop:
            return []
        start = self._offsets[after]
        while stop > after + 1 and self._offsets[stop] - start > MAX_READ_BYTES:
            stop = after + (stop - after) // 2
        blob = self._bytes(start, self._offsets[stop])
        ends = [self._offsets[n] - start for n in range(after, stop + 1)]
        return [blob[a + _HEAD.size : b] for a, b in itertools.pairwise(ends)]

    def close(self) -> None:
        """Closes the file; the spool cannot be used afterwards."""
        os.close(self._fd)

    def _add(self, events: Sequence[bytes]) -> None:
        for event in events:
            self._tail += _HEAD.pack(len(event), zlib.crc32(event)) + event
            self._offsets.append(self._offsets[-1] + _HEAD.size + len(event))

    def _write(self) -> None:
        begin = self._offsets[self._safe]
        with memoryview(self._tail) as view:
            while self._written < self._offsets[-1]:
                self._written += os.pwrite(self._fd, view[self._written - begin :], self._written)

    def _bytes(self, start: int, end: int) -> bytes:
        """A part of the file as it will be: bytes that may not be on the disk come from memory."""
        safe = self._offsets[self._safe]
        head = os.pread(self._fd, min(end, safe) - start, start) if start < safe else b""
        return head + bytes(self._tail[max(start - safe, 0) : max(end - safe, 0)])


def read_spool(path: Path, after: int, limit: int | None = None) -> list[bytes]:
    """Events with a sequence over `after`, once their supervisor is gone; empty if there is no file."""
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
    """Offset and payload of each whole record, from the beginning."""
    with path.open("rb") as file:
        offset = 0
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, crc = _HEAD.unpack(head)
            payload = file.read(length)
            # No event is empty, but a page of zeros would look like empty records.
            if not payload or len(payload) < length or zlib.crc32(payload) != crc:
                return
            yield offset, payload
            offset += _HEAD.size + length
