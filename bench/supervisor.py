"""A supervisor for one bench side: the product's own core on a thread, reached over a socket, its spool on disk."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from pathlib import Path

from shardyard_coordinator.launch.attempt import Attempt
from shardyard_coordinator.launch.frames import frame, read_frame
from shardyard_coordinator.launch.protocols import AttemptKey
from shardyard_coordinator.launch.spool import Spool
from shardyard_coordinator.seams import SystemClock

FD = "BENCH_REPORT_FD"
_LENGTH = struct.Struct(">I")


class Supervisor:
    """Takes the reports of rank 0 and spools them, as an attempt's supervisor does."""

    def __init__(self, folder: Path, *, job_uid: str) -> None:
        self._ours, self.theirs = socket.socketpair()
        folder.mkdir(parents=True)
        self._folder = folder
        self._key = AttemptKey(job_uid, 1)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()

    async def _serve(self) -> None:
        attempt = Attempt(
            self._key, ranks=1, spool=Spool(self._folder / "spool.bin"), logs=self._folder, clock=SystemClock()
        )
        reader, writer = await asyncio.open_connection(sock=self._ours)
        while (request := await read_frame(reader)) is not None:
            writer.write(frame(await attempt.report(request)))
            await writer.drain()


class Sender:
    """In the training process: the trainer's way to its supervisor."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def __call__(self, request: bytes) -> bytes:
        """One request, one reply."""
        self._socket.sendall(frame(request))
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the supervisor is gone")
            data += part
        return data
