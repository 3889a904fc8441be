"""One question to one fork, which is watched while it computes: its memory, its time, and whether it stands still."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NamedTuple

from shardyard_coordinator.launch.forks import WALL, Fork, Stopped, StopWatch, WarmProcessGone, how_it_failed
from shardyard_coordinator.launch.frames import Header
from shardyard_coordinator.launch.protocols import ComputeFailed, ComputeUnavailable, InputFailed

_CHECK_S = 0.1
_MEASURED_BYTES = 32 * 1024**2

_log = logging.getLogger(__name__)


class Question(NamedTuple):
    """A call of a function, and the names of the secrets that it needs."""

    function: str
    request: bytes
    secrets: tuple[str, ...]


class Inspection:
    """One question to one fork, watched."""

    def __init__(self, fork: Fork, function: str, cpu_s: float, memory_bytes: int) -> None:
        self._fork = fork
        self._function = function
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._note: Mapping[str, str] = {}
        self._over = ""
        self._idle = False
        self._stopped = False

    async def run(self, request: bytes, secrets: Mapping[str, str | None]) -> bytes:
        """Raises: InputFailed, ComputeFailed, ComputeUnavailable, WarmProcessGone. Then the fork is ended."""
        # Watch before sending: a stopped fork accepts no more than fits into the socket.
        watch = asyncio.create_task(self._watch())
        try:
            asked: Header = {"function": self._function, "cpu_s": self._cpu_s}
            await self._fork.send(asked | ({"secrets": dict(secrets)} if secrets else {}), request)
            received = await self._answer()
        except BaseException:
            self._fork.kill()
            await end_quietly(self._fork)
            raise
        finally:
            watch.cancel()
        if received is None:
            raise await self._explanation()
        header, body = received
        if header["ok"]:
            return body
        await self._fork.end()
        if header["kind"] == "system":
            raise ComputeFailed(header["error"])
        raise InputFailed(how_it_failed(header["kind"]), note=self._note, log=header["error"])

    async def _answer(self) -> tuple[Mapping[str, str], bytes] | None:
        while (received := await self._fork.receive()) is not None:
            if "reading" not in received[0]:
                return received
            self._note = received[0]["reading"]
        return None

    async def _watch(self) -> None:
        """Ends a fork over its memory, one that neither computes nor answers, and one that is stopped."""
        loop = asyncio.get_running_loop()
        begin_s, before_s = loop.time(), self._fork.cpu_s()
        stop = StopWatch(self._fork.pid)
        while True:
            await asyncio.sleep(_CHECK_S)
            if self._fork.own_bytes() > self._memory_bytes + _MEASURED_BYTES:
                self._over = f"takes more than {self._memory_bytes:,} bytes of memory"
            elif self._fork.cpu_s() - before_s > self._cpu_s + 1:
                self._over = f"takes more than {self._cpu_s:g} s"
            elif loop.time() - begin_s > WALL * self._cpu_s:
                self._over = f"takes more than {WALL * self._cpu_s:g} s"
                # A disk or a network that does not answer may do so later.
                self._idle = self._fork.cpu_s() - before_s < self._cpu_s / 10
            self._stopped = stop.is_over()
            if self._over or self._stopped:
                self._fork.kill()
                return

    async def _explanation(self) -> InputFailed | ComputeUnavailable | Stopped:
        """Why the fork ended without an answer."""
        ending = await self._fork.end()
        if self._stopped:
            return Stopped()
        if self._idle:
            return ComputeUnavailable(f"{self._function} {self._over} without computing")
        over = f"takes more than {self._cpu_s:g} s" if ending.words.endswith("SIGXCPU") else self._over
        return InputFailed(over or f"ends the process that reads it ({ending.words})", note=self._note)


async def end_quietly(fork: Fork) -> bytes:
    """Ends a fork, whatever has become of the process that it is one of."""
    try:
        await fork.end()
    except WarmProcessGone:
        _log.info("fork %s ended with the warm process", fork.pid)
    return b""
