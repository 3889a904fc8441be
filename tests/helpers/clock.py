"""A clock that only moves when a test says so."""

from __future__ import annotations


class ManualClock:
    """Wall and monotonic time; `advance` moves both, `jump_wall` only the wall."""

    def __init__(self, wall_us: int = 1_700_000_000_000_000) -> None:
        self._wall_us = wall_us
        self._monotonic_s = 1000.0

    def now_us(self) -> int:
        return self._wall_us

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        self._wall_us += round(seconds * 1_000_000)
        self._monotonic_s += seconds

    def jump_wall(self, seconds: float) -> None:
        self._wall_us += round(seconds * 1_000_000)
