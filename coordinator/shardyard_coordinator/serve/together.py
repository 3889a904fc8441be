"""Reads that come at once are made together: one snapshot and one hop to a thread for all of them.

A submission reads little; the transaction and the hop around it cost more than what is read. The same goes for looks at
files, which many submissions have in common.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection

from shardyard_coordinator.store.store import Store

_T = TypeVar("_T")
_Key = TypeVar("_Key")
_MOST = 64


class ReadsTogether:
    """Runs queries on the store, those that wait in one read; what a query raises reaches only its caller."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[tuple[Callable[[Connection], Any], asyncio.Future[Any]]] = []
        self._running: asyncio.Task[None] | None = None

    async def read(self, query: Callable[[Connection], _T]) -> _T:
        """The query's answer."""
        done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, done))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
                queries = [query for query, _ in batch]
                try:
                    outcomes = await self._store.read(partial(_outcomes, queries=queries))
                except Exception as error:  # The edge between the read as a whole and everybody who waits for it.
                    outcomes = [(None, error)] * len(batch)
                for (_, done), (value, raised) in zip(batch, outcomes, strict=True):
                    if done.done():  # The caller went away.
                        continue
                    if raised is not None:
                        done.set_exception(raised)
                    else:
                        done.set_result(value)
        finally:
            self._running = None


class LooksTogether(Generic[_Key, _T]):
    """Calls `look(key)` in a thread; who asks for the same key before its look has begun shares it."""

    def __init__(self, look: Callable[[_Key], _T]) -> None:
        self._look = look
        self._waiting: dict[_Key, asyncio.Future[_T]] = {}
        self._running: asyncio.Task[None] | None = None

    async def at(self, key: _Key) -> _T:
        """What the look answers, or raises."""
        done = self._waiting.get(key)
        if done is None:
            done = self._waiting[key] = asyncio.get_running_loop().create_future()
            if self._running is None:
                self._running = asyncio.create_task(self._run())
        return await asyncio.shield(done)

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, {}
                outcomes = await asyncio.to_thread(
                    lambda keys: [_outcome(key, self._look) for key in keys], list(batch)
                )
                for done, (value, raised) in zip(batch.values(), outcomes, strict=True):
                    if raised is not None:
                        done.set_exception(raised)
                        done.exception()  # Seen here, where every caller has left; the callers see it too.
                    else:
                        done.set_result(value)
        finally:
            self._running = None


def _outcomes(conn: Connection, queries: Sequence[Callable[[Connection], Any]]) -> list[tuple[Any, Exception | None]]:
    return [_outcome(conn, query) for query in queries]


def _outcome(subject: Any, query: Callable[[Any], Any]) -> tuple[Any, Exception | None]:
    try:
        return query(subject), None
    except Exception as error:  # The edge between one caller's query and everybody else's read.
        return None, error
