"""A Compute without processes: answers come from functions that the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from shardyard_coordinator.launch.protocols import ComputeUnavailable


class ScriptedCompute:
    """Calls `answers[function](request)`; an answer may raise. `calls` keeps what was asked."""

    def __init__(self, answers: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._answers = dict(answers)
        self.calls: list[tuple[str, bytes]] = []
        self.limits_s: list[float] = []
        self.routes: list[bytes] = []
        self.available = True
        self._after_s = 0.0

    def answer_after(self, seconds: float) -> None:
        """Takes so long for each answer from here on."""
        self._after_s = seconds

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def inspect(
        self, function: str, request: bytes, *, cpu_s: float, route: bytes = b"", **_options: Any
    ) -> bytes:
        self.routes.append(route)
        return await self._call(function, request, cpu_s)

    async def ask(self, function: str, _model: str, request: bytes, *, turn_s: float, **_options: Any) -> bytes:
        return await self._call(function, request, turn_s)

    async def confinement(self) -> Mapping[str, str]:
        return {"landlock": "not available: scripted"}

    async def _call(self, function: str, request: bytes, limit_s: float) -> bytes:
        self.calls.append((function, request))
        self.limits_s.append(limit_s)
        await asyncio.sleep(self._after_s)
        if not self.available or function not in self._answers:
            raise ComputeUnavailable(f"no process answers {function}")
        return self._answers[function](request)
