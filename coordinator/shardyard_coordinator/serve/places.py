"""Places of uploads: few, because each upload writes to the disk; an idle upload gives up its place.

If all are taken, a new upload gets the place of the one that has been idle the longest, if that is long enough. The
other one ends, keeps what has arrived, and can continue when there is a place. A trickling upload counts as idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

from shardyard_coordinator.domain.access import LOCAL_PRINCIPAL
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.limits import Limits

_T = TypeVar("_T")
_MOVING_BYTES: Final = 64 * 1024
"""Less than this within `upload_yield_s` is a trickle."""


class Place(Generic[_T]):
    """One upload's place, which reads its messages. Times are of the loop's clock."""

    def __init__(self, limits: Limits, messages: AsyncIterator[_T]) -> None:
        self._limits = limits
        self._messages = messages
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._bytes = 0
        self._waiting: asyncio.Timeout | None = None
        self._given_up = False

    def idle_s(self) -> float:
        """How long almost nothing has arrived; 0 while the upload is being written or checked."""
        return 0.0 if self._waiting is None or self._given_up else self._loop.time() - self._since

    def give_up(self) -> None:
        """Ends the upload, which waits for its next message."""
        assert self._waiting is not None
        self._given_up = True
        self._waiting.reschedule(self._loop.time())

    def moved(self, num_bytes: int) -> None:
        """Counts arrived bytes: the upload is not idle."""
        self._bytes += num_bytes
        if self._bytes >= _MOVING_BYTES:
            self._bytes, self._since = 0, self._loop.time()

    async def next(self) -> _T | None:
        """The next message, None at the end; Refused DEADLINE_EXCEEDED, or OVERLOADED if the place was given up."""
        idle_s = self._limits.upload_idle_s
        try:
            async with asyncio.timeout(idle_s) as self._waiting:
                return await anext(self._messages, None)
        except TimeoutError:
            step = "continue with the same request_id"
            if self._given_up:
                text = f"nearly nothing arrived for {self._limits.upload_yield_s:g} s, and another upload came; {step}"
                raise Refused(Reason.OVERLOADED, text, retry_after_s=self._limits.upload_yield_s) from None
            raise Refused(Reason.DEADLINE_EXCEEDED, f"nothing arrived for {idle_s:g} s; {step}") from None
        finally:
            self._waiting = None


class UploadPlaces:
    """`max_uploads` places. Used from one loop only."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._taken: dict[Place[Any], str] = {}

    @contextmanager
    def take(self, messages: AsyncIterator[_T], principal: str) -> Iterator[Place[_T]]:
        """Holds a place; Refused OVERLOADED if all are taken by active uploads, or the principal has its share."""
        own = sum(each == principal for each in self._taken.values())
        if principal != LOCAL_PRINCIPAL and own >= self._limits.max_uploads_each:
            text = f"{own} uploads of {principal} are in progress, the maximum for one caller; wait for one of them"
            raise Refused(Reason.OVERLOADED, text, retry_after_s=self._limits.upload_yield_s)
        if len(self._taken) >= self._limits.max_uploads:
            idlest = max(self._taken, key=Place.idle_s, default=None)
            if idlest is None or idlest.idle_s() < self._limits.upload_yield_s:
                text = f"{self._limits.max_uploads} uploads are in progress, the maximum; try again after the delay"
                raise Refused(Reason.OVERLOADED, text, retry_after_s=self._limits.upload_yield_s)
            idlest.give_up()
            self._taken.pop(idlest, None)
        place = Place(self._limits, messages)
        self._taken[place] = principal
        try:
            yield place
        finally:
            self._taken.pop(place, None)
