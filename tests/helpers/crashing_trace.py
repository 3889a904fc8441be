"""A trace that ends its own process with SIGKILL at a named point."""

from __future__ import annotations

import os
import signal


class CrashingTrace:
    """Kills the process when `name` is passed for the `nth` time."""

    def __init__(self, name: str, nth: int = 1) -> None:
        self._name = name
        self._left = nth

    def point(self, name: str) -> None:
        if name != self._name:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class RecordingTrace:
    """Keeps the names of the points passed."""

    def __init__(self) -> None:
        self.points: list[str] = []

    def point(self, name: str) -> None:
        self.points.append(name)
