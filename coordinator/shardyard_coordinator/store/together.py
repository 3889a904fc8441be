"""Batches work that comes at the same time: one transaction and one hop to a thread for all of it.

A submission reads and writes little; the transaction and the hop around it cost more. The same is true of looks at
files, which many submissions have in common.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store.store import Store

_T = TypeVar("_T")
_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)
_MOST = 64
_MAX_WAITING = 1024
# After this many within a short time, wait briefly for more: small batches make the threads take turns at the
# interpreter, which costs more than their work.
_GATHER_FROM = 8
_MOMENT_S = 0.001


class Together(Generic[_Item, _T]):
    """Lets `make` answer for all waiting items, each with a value or an exception, which reaches only its caller.

    After many items within `gather_s`, a batch waits that long for more. A batch begins at the earliest `every_s` after
    the one before it: a single item is not delayed, and many a second share few batches.
    """

    def __init__(
        self,
        make: Callable[[Sequence[_Item]], Awaitable[Sequence[_T | Exception]]],
        *,
        gather_s: float = 0.0,
        every_s: float = 0.0,
    ) -> None:
        self._make = make
        self._gather_s = gather_s
        self._every_s = every_s
        self._begun_s = -math.inf
        self._counted_from_s = -math.inf
        self._counted = 0
        self._waiting: list[tuple[_Item, asyncio.Future[_T]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, item: _Item) -> _T:
        """The item's answer; an item whose caller left before its turn is dropped. Raises: Refused OVERLOADED."""
        if len(self._waiting) >= _MAX_WAITING:
            self._waiting = [each for each in self._waiting if not each[1].done()]
            if len(self._waiting) >= _MAX_WAITING:
                raise Refused(Reason.OVERLOADED, "too many calls wait for this; try again", retry_after_s=1)
        done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                loop = asyncio.get_running_loop()
                if (early_s := self._begun_s + self._every_s - loop.time()) > 0:
                    await asyncio.sleep(early_s)
                self._begun_s = loop.time()
                live = [each for each in self._waiting if not each[1].done()]
                batch, self._waiting = live[:_MOST], live[_MOST:]
                answers = await self._answers([item for item, _ in batch])
                for (_, done), answer in zip(batch, answers, strict=True):
                    if done.done():  # The caller went away meanwhile.
                        continue
                    if isinstance(answer, Exception):
                        done.set_exception(answer)
                    else:
                        done.set_result(answer)
                if self._are_many(len(batch), loop.time()):
                    await self._gather()
        finally:
            self._running = None

    def _are_many(self, count: int, now_s: float) -> bool:
        """Whether enough items came recently that waiting for more pays off."""
        if now_s - self._counted_from_s > self._gather_s:
            self._counted_from_s, self._counted = now_s, 0
        self._counted += count
        if self._counted < _GATHER_FROM:
            return False
        self._counted_from_s = -math.inf
        return True

    async def _gather(self) -> None:
        """Waits until no item has come for a moment."""
        loop = asyncio.get_running_loop()
        ends_s, seen = loop.time() + self._gather_s, 0
        while loop.time() < ends_s:
            await asyncio.sleep(_MOMENT_S)
            if self._waiting and len(self._waiting) == seen:
                return
            seen = len(self._waiting)

    async def _answers(self, items: Sequence[_Item]) -> Sequence[_T | Exception]:
        try:
            return await self._make(items)
        except Exception as error:  # The edge between the batch and the callers of its items.
            return [error] * len(items)


def reads_together(store: Store) -> Together[Callable[[Connection], Any], Any]:
    """Runs queries on one snapshot of the store."""

    async def make(queries: Sequence[Callable[[Connection], Any]]) -> Sequence[Any]:
        return await store.read(lambda conn: [_attempt(query, conn) for query in queries])

    return Together(make)


def looks_together(look: Callable[[_Key], _T]) -> Together[_Key, _T]:
    """Calls `look(key)` in a thread, once for all callers that ask for the same key before it begins."""

    async def make(keys: Sequence[_Key]) -> Sequence[_T | Exception]:
        found = await asyncio.to_thread(lambda: {key: _attempt(look, key) for key in dict.fromkeys(keys)})
        return [found[key] for key in keys]

    return Together(make, gather_s=0.01)


def writes_together(
    store: Store,
    write: Callable[[Connection, Sequence[_Item]], Sequence[_T | Exception]],
    actor: Actor,
    *,
    size: Callable[[_Item], int],
    every_s: float = 0.0,
) -> Together[_Item, _T]:
    """Passes many items to one operation of the store, in one commit; `size` returns an item's bytes."""

    async def make(items: Sequence[_Item]) -> Sequence[_T | Exception]:
        return await store.write(lambda conn: write(conn, items), actor, sum(map(size, items)))

    return Together(make, gather_s=0.01, every_s=every_s)


def _attempt(query: Callable[[Any], _T], subject: Any) -> _T | Exception:
    try:
        return query(subject)
    except DBAPIError:  # An error of the store itself concerns every item.
        raise
    except Exception as error:  # The edge between one caller's query and the others.
        return error
