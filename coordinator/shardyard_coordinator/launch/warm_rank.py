"""The watcher's end of a `fork_server`: a rank as a fork of a warm process, on this machine."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from shardyard_coordinator.launch.fork_server import SOCKET, in_folder, open_folder
from shardyard_coordinator.launch.forks import has_ended
from shardyard_coordinator.launch.frames import FrameError, frame, read_frame
from shardyard_coordinator.launch.heritage import heritage

# Above what the server's own imports and a fork take on a busy machine: to start cold would take as long.
_START_S = 30.0
# How often a rank is looked at whose keeper says nothing, and how many looks have to find it ended.
_LOOK_S = 1.0
_LOOKS = 3


class StartsCold(Exception):
    """Why a rank has to be started as a process of its own, in words."""


class WarmRank:
    """A running fork, with the part of asyncio's Process that a watcher needs."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._reader = reader
        self._writer = writer

    async def wait(self) -> int:
        """Its exit code, negative for a signal. If its keeper was ended, so was it."""
        payload = await self._last_word()
        self.returncode = -signal.SIGKILL if payload is None else json.loads(payload)["status"]
        self._writer.close()
        return self.returncode

    async def _last_word(self) -> bytes | None:
        """What its keeper says; None: the rank has ended and it says nothing, as if it was stopped (SIGSTOP)."""
        word = asyncio.ensure_future(read_frame(self._reader))
        try:
            ended = 0
            while ended < _LOOKS:
                if (await asyncio.wait([word], timeout=_LOOK_S))[0]:
                    return word.result()
                ended = ended + 1 if has_ended(self.pid) else 0
            return None
        finally:
            word.cancel()


async def start_warm(
    folder: Path,
    *,
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    rights: Mapping[str, Sequence[str]],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> tuple[WarmRank, socket.socket]:
    """Starts `program` as a fork of the server in `folder`, with a socket for its reports.

    Raises: StartsCold if there is no server, or if it has refused: a fork of it would be another rank than one that is
    started here.
    """
    try:
        with ExitStack() as unless_it_runs:
            connection = unless_it_runs.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)
            ours, theirs = socket.socketpair()
            unless_it_runs.enter_context(ours)
            with theirs, open_folder(folder) as opened:
                await asyncio.get_running_loop().sock_connect(connection, f"{in_folder(opened)}/{SOCKET}")
                descriptors = [opened, stdout.fileno(), stderr.fileno(), theirs.fileno()]
                socket.send_fds(connection, [b"\0"], descriptors)
            order = {
                "program": program,
                "arguments": list(arguments),
                "environment": dict(environment),
                "rights": {name: list(paths) for name, paths in rights.items()},
                "heritage": heritage(),
            }
            started = await _ordered(connection, order)
            unless_it_runs.pop_all()
            return started, ours
    except TimeoutError:
        raise StartsCold(f"their server did not answer within {_START_S:g} s") from None
    except (FileNotFoundError, ConnectionRefusedError):
        # Before the compute process is warm, and on other nodes than its own, this is how it is.
        raise StartsCold(f"there is no server of ranks in {folder} here, or not yet; compute.log says more") from None
    except (OSError, FrameError) as error:
        raise StartsCold(str(error)) from error


async def _ordered(connection: socket.socket, order: Mapping[str, object]) -> WarmRank:
    """Raises: OSError, FrameError, TimeoutError; then the fork is ended."""
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        async with asyncio.timeout(_START_S):
            writer.write(frame(json.dumps(order).encode()))
            await writer.drain()
            payload = await read_frame(reader)
        answer: dict[str, Any] = {} if payload is None else json.loads(payload)
        if "pid" not in answer:
            raise ConnectionError(answer.get("refused", "the server did not take the order"))
        return WarmRank(answer["pid"], reader, writer)
    except BaseException:
        # At once: the caller closes the socket, and what is not sent yet would be written to its descriptor.
        writer.transport.abort()
        raise
