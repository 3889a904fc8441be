"""A Compute without processes: answers come from functions that the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from shardyard_coordinator.launch.protocols import ComputeUnavailable


class ScriptedCompute:
    """Calls `answers[function](request)`; an answer may raise. `calls` keeps what was asked."""

    def __init__(self, answers: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._answers = dict(answers)
        self.calls: list[tuple[str, bytes]] = []
        self.deadlines_s: list[float] = []
        self.available = True
        self._after_s = 0.0

    def answer_after(self, seconds: float) -> None:
        """Takes so long for each answer from here on."""
        self._after_s = seconds

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def call(self, function: str, request: bytes, *, deadline_s: float) -> bytes:
        self.calls.append((function, request))
        self.deadlines_s.append(deadline_s)
        await asyncio.sleep(self._after_s)
        if not self.available or function not in self._answers:
            raise ComputeUnavailable(f"no process answers {function} within {deadline_s} s")
        return self._answers[function](request)
