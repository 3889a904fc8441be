"""Starts ranks as forks of a process that has already imported what they need: a rank starts in a tenth of the time.

It is forked from the compute process before that is confined, and ends with it. It imports, and keeps one server
running, a fork of its own: one that is ended, by the kernel if memory runs out, say, has a successor at once.

The server listens on a socket in a folder that only the service's account can open. An order for a rank comes with
that folder, opened for reading: a confined rank can connect to the socket, but cannot open the folder, so it cannot
have a process started that may do more than itself. A secret, such as a token, ranks would find in their own memory.

For each order the server forks a keeper, which forks the rank. The keeper holds the connection of the rank's watcher:
when that is closed it ends the rank, and when the rank ends it says how. So a rank ends with its watcher, as one that
was started by it does, and outlives the server.

On the connection come one byte with the descriptors of the folder, stdout, stderr and the rank's reports, then a frame
of JSON: {"program", "arguments", "environment", "rights", "heritage"}. Back go frames: {"refused": why}, or {"pid"}
from the rank once it has all that it takes, and at the end {"status"} from the keeper.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shardyard_coordinator.launch import heritage
from shardyard_coordinator.launch.confined_rank import take_rights
from shardyard_coordinator.launch.frames import frame, receive_frame
from shardyard_coordinator.launch.guard import Owner, bind_to, call_process
from shardyard_coordinator.launch.heritage import Origin

SOCKET = "socket"

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

_ORDER_S = 10
_WAITING = 256
_DESCRIPTORS = 4
# How soon another server or another socket takes the place of one that is gone, and how often that is looked at.
_AGAIN_S = 0.5
_LOOK_S = 2.0
# Added to the share of memory, in thousandths, by which the kernel chooses what it ends.
_FIRST_TO_GO = 500


class _Refused(Exception):
    """Why an order is not carried out, for the watcher, which then starts the rank itself."""


@dataclass(frozen=True)
class _Door:
    """The listening socket, and the folder that it is in, held open: its inode stays its own."""

    listener: socket.socket
    folder: int
    path: Path

    @classmethod
    def open(cls, path: Path) -> _Door:
        """Takes the place of an earlier server's. Raises: OSError if it cannot be this account's alone."""
        path.mkdir(mode=0o700, exist_ok=True)
        with open_folder(path) as opened:
            status = os.fstat(opened)
            if status.st_uid != os.geteuid():
                raise PermissionError(f"{path} belongs to another account")
            os.fchmod(opened, 0o700)
            (path / SOCKET).unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{in_folder(opened)}/{SOCKET}")
            listener.listen(_WAITING)
            return cls(listener, os.dup(opened), path)

    @property
    def stands(self) -> bool:
        """Whether callers still find the socket: a cleaner of old files may have removed it."""
        with suppress(OSError):
            there = (self.path / SOCKET).stat()
            return stat.S_ISSOCK(there.st_mode) and _identity(self.path.stat()) == self.identity
        return False

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the folder."""
        return _identity(os.fstat(self.folder))

    def close(self) -> None:
        """Also what gives the right to order: no rank may have it."""
        self.listener.close()
        os.close(self.folder)


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """The folder, opened for reading, as a server wants to see it. Raises: OSError."""
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield opened
    finally:
        os.close(opened)


def in_folder(opened: int) -> str:
    """An open folder's path that fits into a socket's address, which has at most 107 bytes."""
    return f"/proc/self/fd/{opened}"


def fork_server(folder: Path, modules: Sequence[str], control: socket.socket, origin: Origin) -> int:
    """Forks the process that keeps a server; its number. It closes `control`, which belongs to the compute process.

    Without a kernel that tells of the end of processes, or without the folder above, there is none (0): ranks start
    cold.
    """
    if not hasattr(os, "pidfd_open") or not folder.parent.is_dir():
        _note(f"ranks start cold: the kernel has no pidfd_open, or there is no folder {folder.parent}")
        return 0
    parent = os.getpid()
    try:
        keeper = os.fork()
    except OSError as error:
        _note(f"ranks start cold: no process for their server ({error.strerror})")
        return 0
    if not keeper:
        with _to_the_end():
            bind_to(parent)
            control.close()
            _keep_server(folder, modules, Owner(parent), origin)
    return keeper


def _keep_server(folder: Path, modules: Sequence[str], owner: Owner, origin: Origin) -> NoReturn:
    call_process("sy-warm")
    os.umask(0o077)
    door: _Door | None = None
    with suppress(OSError):
        # At once: what is ordered meanwhile waits for the imports, which would take it as long.
        door = _Door.open(folder)
    for module in modules:
        owner.sleep(0)  # Who has ended has a successor, whose socket this process must not replace.
        importlib.import_module(module)
    make_ready_to_fork()
    said = ""
    while True:
        owner.sleep(0)
        try:
            if door is not None and not door.stands:
                gone, door = door, None
                gone.close()
            door = door or _Door.open(folder)
            server = _start_server(door, origin, owner)
            _note("ranks start warm")
            if code := _outlive(server, owner):
                _note(f"the server of ranks ended with code {code}; another one is started")
            said = ""
        except OSError as error:
            # A full disk, a file system without sockets, too many processes: it may be over in a while.
            if said != (said := f"ranks start cold: {error}"):
                _note(said)
        owner.sleep(_AGAIN_S)


def _note(text: str) -> None:
    """A line in the log of the compute process."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", file=sys.stderr, flush=True)


def make_ready_to_fork() -> None:
    """For a process that has imported all that its forks need."""
    gc.collect()
    gc.freeze()  # Garbage collections in the forks would otherwise copy all shared pages.
    threads = sum(1 for _ in Path("/proc/self/task").iterdir()) if sys.platform == "linux" else 1
    if threads != 1:
        _note(f"{threads} threads in the process that forks: locks of theirs may stay held")


def go_first() -> None:
    """If memory runs out, the kernel ends this process before the coordinator and ranks: it has a successor."""
    with suppress(OSError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(max(_FIRST_TO_GO, int(score.read_text()))))


def _start_server(door: _Door, origin: Origin, owner: Owner) -> int:
    """A server's number. Raises: OSError."""
    parent = os.getpid()
    server = os.fork()
    if not server:
        with _to_the_end():
            bind_to(parent)
            owner.close()
            _serve(door, origin)
    return server


def _outlive(server: int, owner: Owner) -> int:
    """Returns when a server has ended, or was stopped and is ended: it holds nothing that another one lacks."""
    ended = status = 0
    while not ended:
        owner.sleep(_AGAIN_S)  # If that ends, this process, and the server with it.
        ended, status = os.waitpid(server, os.WUNTRACED | os.WNOHANG)
    if os.WIFSTOPPED(status):
        os.kill(server, signal.SIGKILL)
        _, status = os.waitpid(server, 0)
    return os.waitstatus_to_exitcode(status)


def _serve(door: _Door, origin: Origin) -> None:
    """Forks a keeper for each connection, until the door is gone."""
    call_process("sy-forks")
    go_first()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Keepers that have ended leave nothing to be waited for.
    door.listener.settimeout(_LOOK_S)
    while door.stands:
        try:
            connection, _ = door.listener.accept()
        except TimeoutError:
            continue
        except OSError as error:
            _note(f"no order of a rank can be taken: {error}")
            time.sleep(_AGAIN_S)
            continue
        with connection:
            try:
                if not os.fork():
                    _keep(door, connection, origin)
            except OSError as error:
                # Without an answer its watcher starts the rank itself, and says why if that fails too.
                _note(f"no process for a rank: {error}")


def _keep(door: _Door, connection: socket.socket, origin: Origin) -> None:
    """The keeper's whole life."""
    with _to_the_end():
        signal.alarm(_ORDER_S)  # Ends it: a caller that says nothing holds a process no longer than that.
        os.setsid()
        call_process("sy-keeper")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        identity = door.identity
        door.close()
        try:
            order, descriptors = _receive(connection, identity, origin)
        except _Refused as refusal:
            _say(connection, {"refused": str(refusal)})
        else:
            signal.alarm(0)
            _run(connection, order, descriptors)


def _receive(connection: socket.socket, identity: tuple[int, int], origin: Origin) -> tuple[dict[str, Any], list[int]]:
    """An order with the descriptors of its streams. Raises: _Refused, OSError."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, _DESCRIPTORS)
    if not (_is_of_this_account(connection) and len(descriptors) == _DESCRIPTORS):
        raise _Refused("the order is not from this account, or not whole")
    folder, *streams = descriptors
    # Who only has the path of the folder, as `O_PATH` opens it, may not read it.
    if fcntl.fcntl(folder, fcntl.F_GETFL) & os.O_PATH or _identity(os.fstat(folder)) != identity:
        raise _Refused("the order comes without the folder of this server")
    os.close(folder)
    order: dict[str, Any] = json.loads(receive_frame(connection) or b"{}")
    if why := origin.why_not(order):
        raise _Refused(why)
    try:
        heritage.take(order["heritage"])
    except (OSError, ValueError) as error:
        raise _Refused(f"a fork cannot have all that the watcher has: {error}") from error
    order["environment"] = {**origin.set_since(), **order["environment"]}
    return order, streams


def _is_of_this_account(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, account, group = struct.unpack("3i", credentials)
    return (account, group) == (os.geteuid(), os.getegid())


def _run(connection: socket.socket, order: dict[str, Any], descriptors: Sequence[int]) -> None:
    keeper = os.getpid()
    pid = os.fork()
    if not pid:
        _be_rank(connection, order, descriptors, keeper)  # Never returns.
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(pid)
    looks = select.poll()
    looks.register(ended, select.POLLIN)
    looks.register(connection, select.POLLIN)
    if ended not in {descriptor for descriptor, _ in looks.poll()}:
        # Nothing is sent after the order: this is the watcher's end.
        _end_group(pid)
    _, status = os.waitpid(pid, 0)
    _say(connection, {"status": os.waitstatus_to_exitcode(status)})


def _say(connection: socket.socket, what: Mapping[str, Any]) -> None:
    """The watcher may have left."""
    with suppress(OSError):
        connection.sendall(frame(json.dumps(what).encode()))


def _end_group(pid: int) -> None:
    """Ends a rank that was not waited for, and its children; it may not lead its group yet."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)


def _be_rank(connection: socket.socket, order: dict[str, Any], descriptors: Sequence[int], keeper: int) -> None:
    """The rank's whole life: what `confined_rank` and a fresh interpreter do, in this process."""
    with _to_the_end():
        os.setsid()
        bind_to(keeper)
        call_process("sy-rank")
        stdout, stderr, reports = descriptors
        _take_streams(stdout, stderr)
        _begin_afresh(order["environment"])
        sys.argv = [order["program"], *order["arguments"], "--report-fd", str(reports)]
        # As in `confined_rank`: a rank's memory contains users' data.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if order["rights"]:
            take_rights(order["rights"])
        # Only now: who has the number can end the whole group, and who has none starts the rank in another way.
        connection.sendall(frame(json.dumps({"pid": os.getpid()}).encode()))
        connection.close()
        try:
            runpy.run_module(order["program"], run_name="__main__", alter_sys=True)
        finally:
            atexit._run_exitfuncs()


def _take_streams(stdout: int, stderr: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]


def _begin_afresh(environment: Mapping[str, str]) -> None:
    """What a new interpreter has of its own: its environment, its random numbers, its secrets, its ends."""
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    tempfile.tempdir = None
    atexit._clear()  # Those are the server's: they would remove its files, and wait for its threads.
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()  # Python's own does so at a fork; torch starts with the same numbers in every process.
    if (processes := sys.modules.get("multiprocessing.process")) is not None:
        processes.current_process().authkey = os.urandom(32)


@contextmanager
def _to_the_end() -> Iterator[None]:
    """The rest of a fork's life: it never returns, because it must not continue in its parent's code.

    Not `sys.exit`: at exit some libraries join threads that a fork does not have.
    """
    status = 1
    try:
        yield
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:  # edge: as above.
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
