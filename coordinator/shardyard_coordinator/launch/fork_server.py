"""Starts ranks as forks of a process that has already imported what they need: a rank starts in a tenth of the time.

The server is forked from the compute process before that is confined, and ends with it. It listens on a socket in a
folder that only the service's account can open, and takes orders only with the token that lies beside it: a confined
rank, which reads neither, cannot have a process started that may do more than itself.

For each order it forks a keeper, which forks the rank. The keeper holds the connection of the rank's watcher: when that
is closed it ends the rank, and when the rank ends it says how. So a rank ends with its watcher, as one that was started
by it does, and outlives the server.

On the connection come one byte with the descriptors of stdout, stderr and the rank's reports, then a frame of JSON:
{"token", "program", "arguments", "environment", "rights"}. Back go frames {"pid"} and, at the end, {"status"}.
"""

from __future__ import annotations

import gc
import hmac
import importlib
import json
import os
import resource
import runpy
import secrets
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardyard_coordinator.launch.confined_rank import take_rights
from shardyard_coordinator.launch.frames import frame, receive_frame
from shardyard_coordinator.launch.guard import bind_to, unbind

SOCKET, TOKEN = "socket", "token"

WARM = (
    "shardyard_trainer.entry",
    "shardyard_trainer.training.attempt",
    "shardyard_trainer.training.engine",
    "shardyard_trainer.training.evaluating",
    "shardyard_trainer.training.export",
    "shardyard_trainer.training.extracting",
    "shardyard_trainer.training.teacher",
)
"""What ranks import beyond the modules of the compute process."""

_ORDER_S = 10.0
_WAITING = 256
_DESCRIPTORS = 3


def fork_server(folder: Path, control: socket.socket) -> None:
    """Forks the server and returns. It closes `control`, which belongs to the compute process.

    Without a kernel that tells of the end of processes, or without the folder above, there is none: ranks start cold.
    """
    if not hasattr(os, "pidfd_open") or not folder.parent.is_dir():
        return
    parent = os.getpid()
    if os.fork():
        return
    status = 1
    try:
        bind_to(parent)
        control.close()
        listener, token = _open_door(folder)
        for module in WARM:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # As in the compute process: collections in forks would copy all shared pages.
        _serve(listener, token)
        status = 0
    except BaseException:  # edge: an exception of a fork must not continue in its parent's code.
        traceback.print_exc()
    finally:
        _leave(status)


def _open_door(folder: Path) -> tuple[socket.socket, str]:
    """The listening socket and its token, which replace those of an earlier server."""
    os.umask(0o077)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / SOCKET).unlink(missing_ok=True)
    token = secrets.token_hex(32)
    new = folder / f".{TOKEN}"
    new.write_text(token)
    new.rename(folder / TOKEN)
    listener = socket.socket(socket.AF_UNIX)
    with short_path(folder) as place:
        listener.bind(f"{place}/{SOCKET}")
    listener.listen(_WAITING)
    return listener, token


class short_path:
    """A folder by a path that fits into a socket's address, which has at most 107 bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> str:
        self._descriptor = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._descriptor}"

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)


def _serve(listener: socket.socket, token: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Keepers that have ended leave nothing to be waited for.
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            _keep(listener, connection, token)
        connection.close()


def _keep(listener: socket.socket, connection: socket.socket, token: str) -> None:
    """The keeper's whole life."""
    try:
        os.setsid()
        unbind()
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.settimeout(_ORDER_S)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, _DESCRIPTORS)
        order = json.loads(receive_frame(connection) or b"{}")
        if len(descriptors) == _DESCRIPTORS and hmac.compare_digest(str(order.get("token", "")), token):
            _run(connection, order, descriptors)
    except BaseException:  # edge: as above.
        traceback.print_exc()
    finally:
        _leave(0)


def _run(connection: socket.socket, order: dict[str, Any], descriptors: Sequence[int]) -> None:
    keeper = os.getpid()
    pid = os.fork()
    if not pid:
        connection.close()
        _be_rank(order, descriptors, keeper)
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(pid)
    connection.sendall(frame(json.dumps({"pid": pid}).encode()))
    looks = select.poll()
    looks.register(ended, select.POLLIN)
    looks.register(connection, select.POLLIN)
    if ended not in {descriptor for descriptor, _ in looks.poll()}:
        # Nothing is sent after the order: this is the watcher's end.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):
        connection.sendall(frame(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode()))


def _be_rank(order: dict[str, Any], descriptors: Sequence[int], keeper: int) -> None:
    """The rank's whole life: what `confined_rank` and a fresh interpreter do, in this process."""
    status = 1
    try:
        os.setsid()
        bind_to(keeper)
        stdout, stderr, reports = descriptors
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
            os.close(source)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(order["environment"])
        tempfile.tempdir = None
        sys.argv = [order["program"], *order["arguments"], "--report-fd", str(reports)]
        # As in `confined_rank`: a rank's memory contains users' data.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if order["rights"]:
            take_rights(order["rights"])
        runpy.run_module(order["program"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:  # edge: as above.
        traceback.print_exc()
    finally:
        _leave(status)


def _leave(status: int) -> None:
    """Not `sys.exit`: at exit some libraries join threads that a fork does not have."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
