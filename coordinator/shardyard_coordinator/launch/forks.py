"""The coordinator's end of a `compute_worker`: one warm process that is asked for forks, and the forks' streams."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shardyard_coordinator.launch.child import kill_group, start_child
from shardyard_coordinator.launch.confine import Identities
from shardyard_coordinator.launch.frames import Header, frame, pack, read_frame, unpack

_PACKET_BYTES = 64 * 1024
# Above what a fork's whole start and end take on a busy machine: the warm process does nothing else.
_ORDER_S = 6.0
# Longer than a process is stopped in passing, and how often that is checked.
_STOPPED_S = 2.0
_LOOK_S = 0.5
_LOG_BYTES = 8 * 1024**2
# Times the time that a fork may compute for: a busy machine is slow, and a fork that hardly computes in so long waits
# for something, such as a disk.
WALL = 10.0

_log = logging.getLogger(__name__)


class WarmProcessGone(Exception):
    """The warm process ended, and every fork of it: nothing of that is a question's fault."""


class Stopped(WarmProcessGone):
    """A fork was stopped from outside (SIGSTOP), did not continue, and was ended: not the request's fault either."""

    def __init__(self) -> None:
        super().__init__("a compute process was stopped (SIGSTOP), did not continue and was ended")


class StopWatch:
    """Checks whether a process stays stopped. Its state shows that, however busy the machine is."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._looked_s = 0.0
        self._since_s: float | None = None

    def is_over(self) -> bool:
        """Whether every check over more than `_STOPPED_S` found it stopped; may be called at any rate."""
        now = time.monotonic()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self._since_s = (self._since_s or now) if is_stopped(self._pid) else None
        return self._since_s is not None and self._looked_s - self._since_s > _STOPPED_S


@dataclass(frozen=True)
class Ending:
    """How a fork ended: its exit code, negative for a signal, None if it is not known."""

    status: int | None

    @property
    def words(self) -> str:
        """How the process ended, for a message."""
        if self.status is not None and self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"ended with exit code {self.status}"


def how_it_failed(kind: str) -> str:
    """How a fork's function ended without an answer, for a message."""
    return "needs more memory than is allowed" if kind == "memory" else "fails with an unexpected error"


@dataclass(frozen=True, eq=False)
class Fork:
    """One fork: frames go to it and come from it."""

    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    warm: WarmProcess

    async def send(self, header: Header, body: bytes = b"") -> None:
        """Sends a frame; if the fork is gone, the next read reports it."""
        with suppress(ConnectionError):
            self.writer.write(frame(pack(header, body)))
            await self.writer.drain()

    async def receive(self) -> tuple[Header, bytes] | None:
        """The next frame; None: it is gone."""
        payload = await read_frame(self.reader)
        return None if payload is None else unpack(payload)

    async def end(self) -> Ending:
        """Ends it, unless it has ended; returns how it ended."""
        self.writer.close()
        return await self.warm.end(self.pid)

    def kill(self) -> None:
        """Ends it at once; `end` then returns how it ended. Its process id is not reused before that."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def own_bytes(self) -> int:
        """Resident memory beyond that of the warm process; 0 if it is gone."""
        return max(0, resident_bytes(self.pid) - self.warm.base_bytes)

    def cpu_s(self) -> float:
        """Its CPU time so far, in seconds."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)


class WarmProcess:
    """A running `compute_worker`, ready to fork."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._lock = asyncio.Lock()
        self._killed = False
        self._watching = [asyncio.create_task(self._watch())]
        self.confinement: Mapping[str, str] = {}
        self.folders: Identities = ()
        self.base_bytes = 0

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can fork: it was not ended, and no order has found it gone."""
        return not self._killed

    @classmethod
    async def start(
        cls,
        *,
        warm: Sequence[str],
        confine: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
        ranks: str = "",
        warm_ranks: Sequence[str] = (),
    ) -> WarmProcess:
        """Starts one and waits until it has imported everything.

        `ranks` is the folder of its `fork_server`, if any, and `warm_ranks` are the modules that this one imports.

        Raises: OSError; WarmProcessGone if it ends meanwhile.
        """
        rotate(log)
        with log.open("ab") as stream:
            process, control = await start_child(
                # -P: the current folder of the service must not supply modules, nor be read.
                [
                    *("-P", "-m", "shardyard_coordinator.launch.compute_worker"),
                    *("--warm", ",".join(warm), "--confine", json.dumps(confine)),
                    *("--ranks", ranks, "--warm-ranks", ",".join(warm_ranks)),
                ],
                fd_option="--fd",
                environment=environment,
                stdout=stream,
                stderr=stream,
                kind=socket.SOCK_SEQPACKET,
            )
        control.setblocking(False)
        self = cls(process, control)
        try:
            ready = await self._receive()
        except BaseException:
            await self.close()
            raise
        self.confinement = ready["confinement"]
        self.folders = tuple(None if each is None else (each[0], each[1]) for each in ready["folders"])
        self.base_bytes = resident_bytes(process.pid)
        if ready["ranks"]:
            self._watching.append(asyncio.create_task(self._watch_ranks(ready["ranks"])))
        return self

    async def fork(self, *, serve: str, memory_bytes: int, network: bool) -> Fork:
        """A new fork that serves with the factory `serve`, or with "" an inspection.

        Raises: WarmProcessGone; OSError if the kernel has no process more.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            asked = self._order({"serve": serve, "memory_bytes": memory_bytes, "network": network}, theirs.fileno())
        try:
            answer = await asyncio.shield(asked)
            if "errno" in answer:
                raise OSError(answer["errno"], os.strerror(answer["errno"]))
            pid = answer["pid"]
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            asked.add_done_callback(self._end_unwanted)
            raise
        return Fork(pid, reader, writer, self)

    async def end(self, pid: int) -> Ending:
        """Ends a fork. Raises WarmProcessGone; then the fork is gone too."""
        answer = await asyncio.shield(self._order({"end": pid}))
        return Ending(answer["status"])

    async def wait(self) -> None:
        """Returns when the process has ended."""
        await self._process.wait()

    def kill(self) -> None:
        """Ends the process and its forks. Idempotent."""
        if not self._killed:
            self._killed = True
            kill_group(self._process.pid)
            with suppress(OSError):
                # Not closed: the loop may still read it, and its descriptor could be reused.
                self._control.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Ends the process, and closes its socket once no order waits for it."""
        for watching in self._watching:
            watching.cancel()
        self.kill()
        async with self._lock:
            self._control.close()

    async def _watch(self) -> None:
        """Ends it if it is stopped, because then neither it nor most of its forks answer."""
        stop = StopWatch(self.pid)
        while True:
            await asyncio.sleep(_LOOK_S)
            if stop.is_over():
                _log.warning("the warm process was stopped (SIGSTOP) and did not continue: it is ended")
                self.kill()
                return

    async def _watch_ranks(self, pid: int) -> None:
        """Ends this process if the one that keeps the server of ranks was ended or stopped: only its successor has one.

        One that ended by itself would do so again.
        """
        stop = StopWatch(pid)
        while not has_ended(pid):
            if stop.is_over():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_LOOK_S)
        with suppress(WarmProcessGone):
            ending = await self.end(pid)
            by_itself = ending.status is not None and ending.status >= 0
            _log.warning(
                "ranks start cold: the process with their server %s%s",
                ending.words,
                "; see compute.log" if by_itself else ", and is started again with the compute processes",
            )
            if not by_itself:
                self.kill()

    def _order(self, order: Mapping[str, Any], *descriptors: int) -> asyncio.Future[dict[str, Any]]:
        """Sends one order at a time, because answers come in order. Shield it: it must outlive its caller."""
        exchange = asyncio.ensure_future(self._exchange(order, [os.dup(descriptor) for descriptor in descriptors]))
        exchange.add_done_callback(_heard)
        return exchange

    def _end_unwanted(self, asked: asyncio.Future[dict[str, Any]]) -> None:
        """Ends and reaps a fork whose caller left before receiving it, because nothing else would."""
        if not asked.cancelled() and asked.exception() is None and "pid" in asked.result():
            self._order({"end": asked.result()["pid"]})

    async def _exchange(self, order: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """The answer to an order. Closes the descriptors."""
        try:
            async with self._lock, asyncio.timeout(_ORDER_S):
                if self._killed:
                    raise WarmProcessGone("the warm process ended")
                socket.send_fds(self._control, [json.dumps(order).encode()], descriptors)
                return await self._receive()
        except (OSError, TimeoutError) as error:
            # Later answers could not be matched with their orders.
            self.kill()
            raise WarmProcessGone("the warm process does not answer") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _receive(self) -> dict[str, Any]:
        packet = await asyncio.get_running_loop().sock_recv(self._control, _PACKET_BYTES)
        if not packet:
            self.kill()  # Its forks end with it, and it gets no more orders.
            raise WarmProcessGone("the warm process ended")
        answer: dict[str, Any] = json.loads(packet)
        return answer


def _heard(exchange: asyncio.Future[dict[str, Any]]) -> None:
    """Retrieves the error of an order whose caller has left, so that asyncio does not log it."""
    if not exchange.cancelled():
        exchange.exception()


def rotate(log: Path, *, most_bytes: int = _LOG_BYTES) -> None:
    """Rotates a log that is too large, and keeps the previous one. Its writers must append."""
    try:
        if (size := log.stat().st_size) > most_bytes:
            with log.open("rb") as stream:
                stream.seek(size - most_bytes)
                log.with_name(f"{log.name}.1").write_bytes(stream.read(most_bytes))
            os.truncate(log, 0)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("%s cannot be started again: %s", log, error)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to take its exit code."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; false if a debugger holds it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
