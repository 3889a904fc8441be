"""Turns at a scarce resource: the caller that was served longest ago is next, and nobody gets the last place twice."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

Caller = tuple[str, ...]
"""From the widest to the narrowest, such as (principal, connection): turns go around each level."""


class TooManyWaiting(Exception):
    """The caller has as many questions waiting as one may have."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    caller: Caller
    number: int
    turn: asyncio.Future[None]


class Served:
    """When callers were served; `rank` orders callers by how long ago that was, the widest level first."""

    def __init__(self, *, kept: int = 4096) -> None:
        self._times: dict[Caller, int] = {}
        self._numbers = itertools.count(1)
        self._kept = kept

    def note(self, caller: Caller) -> None:
        """The caller, and every level above it, is served now."""
        now = next(self._numbers)
        for end in range(1, len(caller) + 1):
            self._times.pop(caller[:end], None)
            self._times[caller[:end]] = now
        while len(self._times) > self._kept:
            del self._times[next(iter(self._times))]

    def rank(self, caller: Caller) -> tuple[int, ...]:
        """The sort key of a caller: the smallest is next."""
        return tuple(self._times.get(caller[:end], 0) for end in range(1, len(caller) + 1))


class Turns:
    """Allows `places` turns at once. Of two or more places one caller never holds all: others wait one turn at most."""

    def __init__(self, places: int, *, most_waiting: int = 64) -> None:
        self._free = places
        self._each = max(places - 1, 1)
        self._most_waiting = most_waiting
        self._held: Counter[Caller] = Counter()
        self._waiting: list[_Waiting] = []
        self._served = Served()
        self._numbers = itertools.count()

    @asynccontextmanager
    async def turn(self, caller: Caller) -> AsyncIterator[None]:
        """Waits for a turn and holds it.

        Raises: TooManyWaiting.
        """
        if sum(each.caller == caller for each in self._waiting) >= self._most_waiting:
            raise TooManyWaiting(f"{self._most_waiting} questions of this caller wait already")
        waiting = _Waiting(caller, next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._give()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:  # The turn was assigned at the same moment.
                self._back(caller)
            raise
        try:
            yield
        finally:
            self._back(caller)

    def _back(self, caller: Caller) -> None:
        self._free += 1
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]
        self._give()

    def _give(self) -> None:
        while self._free:
            ready = [each for each in self._waiting if self._held[each.caller] < self._each and not each.turn.done()]
            if not ready:
                return
            chosen = min(ready, key=lambda each: (self._served.rank(each.caller), each.number))
            self._waiting.remove(chosen)
            self._served.note(chosen.caller)
            self._held[chosen.caller] += 1
            self._free -= 1
            chosen.turn.set_result(None)
