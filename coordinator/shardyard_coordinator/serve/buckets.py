"""Token buckets by key: how much each key may do at once, and how fast after that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from shardyard_coordinator.seams import Clock

_MOST_KEYS: Final = 10_000


class Buckets:
    """A bucket for each key, full at first: `burst` at once, `per_s` in the long run.

    Keys that were not used for the longest time are forgotten, which fills their buckets: at that time they are full.
    """

    def __init__(self, burst: float, per_s: float, clock: Clock) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def wait_s(self, key: Hashable, count: int = 1) -> float:
        """Seconds until `count` more are allowed; 0: now. Takes nothing."""
        missing = count - self._level(key)
        return max(missing / self._per_s, 0.0)

    def take(self, key: Hashable, count: int = 1) -> bool:
        """Takes `count`, or nothing; False if fewer are left."""
        level = self._level(key)
        if level < count:
            return False
        self._levels[key] = level - count, self._clock.monotonic_s()
        self._levels.move_to_end(key)
        while len(self._levels) > _MOST_KEYS:
            self._levels.popitem(last=False)
        return True

    def _level(self, key: Hashable) -> float:
        level, since_s = self._levels.get(key, (self._burst, 0.0))
        return min(level + (self._clock.monotonic_s() - since_s) * self._per_s, self._burst)
