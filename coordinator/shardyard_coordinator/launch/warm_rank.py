"""The watcher's end of a `fork_server`: a rank as a fork of a warm process, on this machine."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from shardyard_coordinator.launch.fork_server import SOCKET, TOKEN, short_path
from shardyard_coordinator.launch.frames import FrameError, frame, read_frame

# Above what the server's own imports and a fork take on a busy machine: to start cold would take as long.
_START_S = 30.0

_log = logging.getLogger(__name__)


class WarmRank:
    """A running fork, with the part of asyncio's Process that a watcher needs."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._reader = reader
        self._writer = writer

    async def wait(self) -> int:
        """Its exit code, negative for a signal. If its keeper was ended, so was it."""
        payload = await read_frame(self._reader)
        self.returncode = -signal.SIGKILL if payload is None else json.loads(payload)["status"]
        self._writer.close()
        return self.returncode


async def start_warm(
    folder: Path,
    *,
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    rights: Mapping[str, Sequence[str]],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> tuple[WarmRank, socket.socket] | None:
    """Starts `program` as a fork of the server in `folder`, with a socket for its reports; None: there is no server."""
    order = {
        "program": program,
        "arguments": list(arguments),
        "environment": dict(environment),
        "rights": {name: list(paths) for name, paths in rights.items()},
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            order["token"] = (folder / TOKEN).read_text()
            with short_path(folder) as place:
                await asyncio.get_running_loop().sock_connect(connection, f"{place}/{SOCKET}")
            socket.send_fds(connection, [b"\0"], [stdout.fileno(), stderr.fileno(), theirs.fileno()])
            return await _ordered(connection, order), ours
        except (OSError, FrameError, TimeoutError) as error:
            # Before the compute process is warm, and on other nodes than its own, this is how it is.
            _log.info("no warm process for a rank (%s): it is started cold", error or type(error).__name__)
            connection.close()
            ours.close()
            return None


async def _ordered(connection: socket.socket, order: Mapping[str, object]) -> WarmRank:
    """Raises: OSError, FrameError, TimeoutError; then the fork is ended."""
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        async with asyncio.timeout(_START_S):
            writer.write(frame(json.dumps(order).encode()))
            await writer.drain()
            payload = await read_frame(reader)
        if payload is None:
            raise ConnectionError("the server did not take the order")
        return WarmRank(json.loads(payload)["pid"], reader, writer)
    except BaseException:
        writer.close()
        raise
