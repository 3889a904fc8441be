"""Work that all callers with the same question share, and that continues when a caller leaves.

A result that no caller waited for is kept for a while, so that a repeated question costs nothing. Only a few pieces of
work continue without a caller, so that callers who keep leaving cannot pile up work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shardyard_coordinator.domain.errors import Refused

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_KEPT_S = 60.0
_MOST_KEPT = 64


@dataclass(eq=False)
class _Work(Generic[_T]):
    """One piece of work, and the number of its waiting callers."""

    task: asyncio.Future[_T]
    waiting: int = 0


class Shared(Generic[_T]):
    """Does work once for all callers that ask for the same key at the same time.

    `most_left`: how many pieces of work continue without a caller; a further one that is left is cancelled.
    """

    def __init__(self, *, most_left: int = 16) -> None:
        self._most_left = most_left
        self._works: dict[bytes, _Work[_T]] = {}
        self._unheard: OrderedDict[bytes, tuple[float, _T | Refused]] = OrderedDict()

    async def get(self, key: bytes, make: Callable[[], Awaitable[_T]]) -> _T:
        """The result or error of `make()`, or a recent one that no caller waited for."""
        self._forget_old()
        if key in self._unheard:
            _, outcome = self._unheard.pop(key)
            if isinstance(outcome, Refused):
                raise outcome
            return outcome
        work = self._works.get(key)
        if work is None:
            work = self._works[key] = _Work(asyncio.ensure_future(make()))
            work.task.add_done_callback(lambda _: self._ended(key, work))
        work.waiting += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiting -= 1
            if not work.waiting and not work.task.done() and self._num_left() > self._most_left:
                del self._works[key]  # Later callers start again.
                work.task.cancel()

    def _num_left(self) -> int:
        return sum(not work.waiting for work in self._works.values())

    def _ended(self, key: bytes, work: _Work[_T]) -> None:
        if self._works.get(key) is work:
            del self._works[key]
        if work.task.cancelled():
            return
        error = work.task.exception()  # Retrieved here too, in case every caller has left.
        if work.waiting:
            return
        if error is None:
            self._keep(key, work.task.result())
        elif not isinstance(error, Refused):
            _log.error("work failed that no caller waits for any more", exc_info=error)
        elif error.retry_after_s is None:
            self._keep(key, error.fresh_copy())

    def _keep(self, key: bytes, outcome: _T | Refused) -> None:
        self._unheard[key] = time.monotonic() + _KEPT_S, outcome
        self._forget_old()

    def _forget_old(self) -> None:
        now_s = time.monotonic()
        while self._unheard:
            key, (until_s, _) = next(iter(self._unheard.items()))
            if until_s > now_s and len(self._unheard) <= _MOST_KEPT:
                return
            del self._unheard[key]
