"""The one writer: a thread that commits whatever is waiting as one transaction (docs/reliability.md).

Each operation runs in a savepoint, so a refusal or a conflict reaches its own caller only. Every commit
first updates the lease row: if no row changes, a newer coordinator holds the lease, and this one must not write.
Events are sent after their commit and before the callers get their reply.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, update
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import EventRecord
from shardyard_coordinator.seams import Actor, Clock
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.failures import StoreFailure, StoreLost
from shardyard_coordinator.store.sql import Prepared, begin_events, in_savepoint, noted_metrics
from shardyard_coordinator.store.sqlite import UNUSABLE, empty_log, meaning

MAX_BATCH = 256
MAX_BATCH_BYTES = 4 << 20
MAX_WAITING = 4096
MAX_WAITING_BYTES = 64 << 20
LEASE_US = 10_000_000
_LOG_REST_S = 5.0

_log = logging.getLogger(__name__)
_lease = tables.lease.c
_RENEW = Prepared(
    update(tables.lease)
    .where(_lease.id == 1, _lease.term == bindparam("term"), _lease.commits == bindparam("seen"))
    .values(commits=_lease.commits + 1, until_us=bindparam("until"))
)


@dataclass
class Write:
    """An operation that waits for its commit."""

    operation: Callable[[Connection], Any]
    actor: Actor
    size_bytes: int
    done: asyncio.Future[Any]


@dataclass(frozen=True)
class _Outcome:
    write: Write
    value: Any
    error: BaseException | None


class Writer:
    """Owns the connection that writes. `tell(events, jobs whose metrics have grown)` is called on the event loop after
    each commit."""

    def __init__(
        self,
        conn: Connection,
        *,
        path: Path,
        term: int,
        clock: Clock,
        log_wait_ms: int,
        tell: Callable[[Sequence[EventRecord], frozenset[str]], None],
        fail: Callable[[StoreFailure], None],
    ) -> None:
        self._conn = conn
        self._path = path
        self._term = term
        self._commits = 0
        self._log_after_s = 0.0
        self._log_wait_ms = log_wait_ms
        self._clock = clock
        self._tell = tell
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._failure: StoreFailure | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[Connection], Any], actor: Actor, size_bytes: int) -> asyncio.Future[Any]:
        """Queues an operation; the future ends with its commit. Raises: Refused OVERLOADED, STORE_UNAVAILABLE."""
        if self._failure is not None:
            raise Refused(Reason.STORE_UNAVAILABLE, UNUSABLE, retry_after_s=5)
        if self._queue.qsize() >= MAX_WAITING or self._waiting_bytes + size_bytes > MAX_WAITING_BYTES:
            raise Refused(Reason.OVERLOADED, "too many writes are waiting; try again", retry_after_s=1)
        done: asyncio.Future[Any] = self._loop.create_future()
        self._waiting_bytes += size_bytes
        self._queue.put(Write(operation, actor, size_bytes, done))
        return done

    def close(self) -> None:
        """Commits waiting operations and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            batch, ended = self._take(first)
            self._commit(batch)
            if ended:
                return

    def _take(self, first: Write) -> tuple[list[Write], bool]:
        batch, size = [first], first.size_bytes
        while len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
            if write is None:
                return batch, True
            batch.append(write)
            size += write.size_bytes
        return batch, False

    def _commit(self, batch: list[Write]) -> None:
        """One transaction; an error of the transaction itself goes to every caller of the batch."""
        outcomes: list[_Outcome] = []
        events: list[EventRecord] | None = None
        try:
            if self._failure is not None:
                raise self._failure
            with self._conn.begin():
                events = begin_events(self._conn)
                self._renew()
                outcomes = [_Outcome(write, *in_savepoint(self._conn, write.operation)) for write in batch]
            self._commits += 1
            self._empty_log()
        except DBAPIError as error:
            outcomes, events = self._spoilt(batch, meaning(error, self._path) or error), None
        except StoreFailure as error:
            outcomes, events = self._spoilt(batch, error), None
        grown = noted_metrics(self._conn) if events is not None else frozenset()
        self._loop.call_soon_threadsafe(self._deliver, events, grown, outcomes)

    def _empty_log(self) -> None:
        """Keeps the write-ahead log short; if readers prevented that, the next try is a while later."""
        now_s = time.monotonic()
        if now_s >= self._log_after_s and not empty_log(self._conn, self._path, self._log_wait_ms):
            self._log_after_s = now_s + _LOG_REST_S

    def _renew(self) -> None:
        until = self._clock.now_us() + LEASE_US
        if _RENEW.run(self._conn, term=self._term, seen=self._commits, until=until).rowcount != 1:
            raise StoreLost(f"another coordinator has taken the store {self._path}")

    def _spoilt(self, batch: list[Write], error: BaseException) -> list[_Outcome]:
        if isinstance(error, StoreFailure):
            self._failure = error
            refusal = Refused(Reason.STORE_UNAVAILABLE, UNUSABLE, retry_after_s=5)
            return [_Outcome(write, None, refusal) for write in batch]
        if not isinstance(error, Refused):
            _log.error("a transaction failed (%s)", batch[0].actor.method, exc_info=error)
        return [_Outcome(write, None, error) for write in batch]

    def _deliver(self, events: list[EventRecord] | None, grown: frozenset[str], outcomes: list[_Outcome]) -> None:
        """Delivers outcomes. `events` are those of the commit, possibly none; None if nothing was committed."""
        if events is not None:
            self._tell(events, grown)
        for outcome in outcomes:
            self._waiting_bytes -= outcome.write.size_bytes
            done = outcome.write.done
            if done.done():  # The caller left; its operation was committed anyway.
                continue
            if outcome.error is not None:
                done.set_exception(outcome.error)
            else:
                done.set_result(outcome.value)
        if self._failure is not None:
            self._fail(self._failure)
