"""Child processes that end with this one and communicate with it over a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import IO

from shardyard_coordinator.launch import guard


async def start_child(
    arguments: Sequence[str],
    *,
    fd_option: str,
    environment: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Starts `python arguments... fd_option N` as the leader of a new process group; N is its end of the pair.

    Raises: OSError.
    """
    ours, theirs = socket.socketpair(type=kind)
    with theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(os.getpid())),
                *(sys.executable, *arguments, fd_option, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=current_folder(),
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


def current_folder() -> str | None:
    """The folder for a child: `/` if the current one was removed, because libraries ask for it when they are imported.

    None: the current one, in which a process may be though it may not enter it.
    """
    try:
        os.getcwd()  # noqa: PTH109 - whether there is one.
    except FileNotFoundError:
        return "/"
    return None


def kill_group(pid: int) -> None:
    """Ends a child and its own children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
