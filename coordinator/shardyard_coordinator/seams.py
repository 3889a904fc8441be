"""Seams of the coordinator's parts: the clock, crash points, and the actor of a change."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """The clock. Wall time is for display only; durations and order never come from it."""

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
    """Ignores every point."""

    def point(self, name: str) -> None:
        """Passes the point."""


@dataclass(frozen=True)
class Actor:
    """The author of a change, recorded with it. `only_own`: it may change what it made, nothing that others made.

    `credential` says how it was recognised, such as `tokens/abc`; `peer` is the address that it called from.
    """

    principal: str
    method: str
    request_id: str = ""
    credential: str = ""
    peer: str = ""
    only_own: bool = False


SYSTEM = Actor("system", "system")
