"""What the coordinator's parts are given from outside: time, crash points, and who acts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Time. Wall time is only shown; durations and order never come from it."""

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start, never going back."""


class SystemClock:
    """The machine's clocks."""

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start, never going back."""
        return time.monotonic()


class Trace(Protocol):
    """Named points of the code (docs/reliability.md): timed in production, crashed at in tests."""

    def point(self, name: str) -> None:
        """Passes the point."""


class NullTrace:
    """Passes every point in silence."""

    def point(self, name: str) -> None:
        """Passes the point."""


@dataclass(frozen=True)
class Actor:
    """Who makes a change: kept with it."""

    principal: str
    method: str
    request_id: str = ""


SYSTEM = Actor("system", "system")
