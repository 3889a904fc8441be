"""The one writer: a thread that commits whatever is waiting as one transaction (docs/reliability.md).

Each operation runs in a savepoint, so a refusal or a conflict reaches its own caller only. Every commit
first updates the lease row: if no row changes, a newer coordinator holds the lease, and this one must not write.
Events are sent after their commit and before the callers get their reply.

If the connection is lost, the lease row tells whether the commit happened: then the callers get their results, else the
operations run again, so an operation may run more than once, and only its last run counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import EventRecord
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store.database import AWAY, UNUSABLE, Database, Taken
from shardyard_coordinator.store.failures import StoreFailure, StoreLost
from shardyard_coordinator.store.lease import give_up_lease, read_lease, renew_lease
from shardyard_coordinator.store.sql import begin_events, in_savepoint, noted_metrics

MAX_BATCH = 256
MAX_BATCH_BYTES = 4 << 20
MAX_WAITING = 4096
MAX_WAITING_BYTES = 64 << 20
MAX_AWAY_S = 5.0
"""How long writes wait for a database that is away."""
_LOG_REST_S = 5.0
_AGAIN_S = (0.02, 0.1, 0.25, 0.5)

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class _Made:
    """A transaction whose operations have all run: its events, the jobs with new metrics, and what to tell callers."""

    events: list[EventRecord]
    grown: frozenset[str]
    outcomes: list[_Outcome]


@dataclass(frozen=True)
class WriterFigures:
    """What waits now, and what was committed since the start; `commit_s` is the time in transactions."""

    waiting: int
    waiting_bytes: int
    commits: int
    operations: int
    failed_commits: int
    commit_s: float


class Writer:
    """Owns the connection that writes. `tell(events, jobs whose metrics have grown)` is called on the event loop after
    each commit."""

    def __init__(
        self,
        database: Database,
        engine: Engine,
        taken: Taken,
        *,
        log_wait_ms: int,
        tell: Callable[[Sequence[EventRecord], frozenset[str]], None],
        fail: Callable[[StoreFailure], None],
    ) -> None:
        self._database = database
        self._engine = engine
        self._conn: Connection | None = taken.conn
        self._term = taken.term
        self._commits = 0
        self._operations = 0
        self._failed_commits = 0
        self._commit_s = 0.0
        self._log_after_s = 0.0
        self._log_wait_ms = log_wait_ms
        self._tell = tell
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._failure: StoreFailure | None = None
        self._away_since_s: float | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def is_away(self) -> bool:
        """Whether the database has been away for so long that nobody should wait for it."""
        since_s = self._away_since_s
        return since_s is not None and time.monotonic() - since_s >= MAX_AWAY_S

    def submit(self, operation: Callable[[Connection], Any], actor: Actor, size_bytes: int) -> asyncio.Future[Any]:
        """Queues an operation; the future ends with its commit. Raises: Refused OVERLOADED, STORE_UNAVAILABLE."""
        if self._failure is not None:
            raise Refused(Reason.STORE_UNAVAILABLE, UNUSABLE, retry_after_s=5)
        if self.is_away:
            raise away()
        if self._queue.qsize() >= MAX_WAITING or self._waiting_bytes + size_bytes > MAX_WAITING_BYTES:
            raise Refused(Reason.OVERLOADED, "too many writes are waiting; try again", retry_after_s=1)
        done: asyncio.Future[Any] = self._loop.create_future()
        self._waiting_bytes += size_bytes
        self._queue.put(Write(operation, actor, size_bytes, done))
        return done

    @property
    def figures(self) -> WriterFigures:
        """The figures of now, for monitoring."""
        return WriterFigures(
            waiting=self._queue.qsize(),
            waiting_bytes=self._waiting_bytes,
            commits=self._commits,
            operations=self._operations,
            failed_commits=self._failed_commits,
            commit_s=self._commit_s,
        )

    def close(self) -> None:
        """Commits waiting operations, unless the database is away, and ends the thread."""
        self._ending.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            try:
                first = self._queue.get(timeout=self._database.renew_s)
            except queue.Empty:
                self._commit([])  # Only to renew the lease.
                continue
            batch, ended = self._take(first) if first is not None else ([], True)
            if batch:
                self._commit(batch)
        self._give_up()
        self._drop()

    def _give_up(self) -> None:
        """Ends the lease, so that the next process takes it at once."""
        if self._conn is not None and self._database.renew_s is not None and self._failure is None:
            with contextlib.suppress(DBAPIError), self._conn.begin():
                give_up_lease(self._conn, self._term)

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
        made: _Made | None = None
        outcomes: list[_Outcome] = []
        try:
            if self._failure is not None:
                raise self._failure
            begun_s = time.monotonic()
            made = self._surely(batch)
            self._operations += len(batch)
            self._commit_s += time.monotonic() - begun_s
            self._shorten()
        except DBAPIError as error:
            outcomes = self._spoilt(batch, self._database.meaning(error) or error)
        except (StoreFailure, Refused) as error:
            outcomes = self._spoilt(batch, error)
        if batch or self._failure is not None:
            self._loop.call_soon_threadsafe(self._deliver, made, outcomes)

    def _surely(self, batch: list[Write]) -> _Made:
        """Repeats a transaction until it is known to be in the store, or has failed for sure.

        Raises: DBAPIError; StoreLost; Refused STORE_UNAVAILABLE if the database is away for long.
        """
        tries = 0
        while True:
            made: list[_Made] = []
            try:
                self._transaction(self._connected(), batch, made)
            except DBAPIError as error:
                lost = self._database.is_lost(error)
                if not lost and not self._database.passes(error):
                    raise
                self._note_away(error)
                if lost:
                    self._drop()
                if not (lost and made and self._has_committed()):
                    self._rest(tries, error)
                    tries += 1
                    continue
            self._commits += 1
            self._note_back()
            return made[0]

    def _transaction(self, conn: Connection, batch: list[Write], made: list[_Made]) -> None:
        """`made` gets the result before the commit, whose outcome may stay unknown."""
        with conn.begin():
            events = begin_events(conn)
            if not renew_lease(conn, self._term, self._commits):
                raise self._replaced(conn)
            outcomes = [_Outcome(write, *in_savepoint(conn, write.operation)) for write in batch]
            made.append(_Made(events, noted_metrics(conn), outcomes))

    def _has_committed(self) -> bool:
        """Whether the commit happened whose outcome was lost; asks until the database answers.

        A transaction that is still in flight holds the row, so the answer is final. Raises: StoreLost; Refused
        STORE_UNAVAILABLE if the service ends before there is an answer.
        """
        tries = 0
        while True:
            try:
                conn = self._connected()
                with conn.begin():
                    lease = read_lease(conn, locked=True)
                    if lease is None or lease.term != self._term:
                        raise self._replaced(conn)
                self._note_back()
                return lease.commits == self._commits + 1
            except DBAPIError as error:
                if not self._database.is_lost(error) and not self._database.passes(error):
                    raise
                self._note_away(error)
                self._drop()
                if self.is_away:
                    self._refuse_waiting()
                if self._ending.wait(_pause_s(tries)):
                    raise away() from error
                tries += 1

    def _rest(self, tries: int, error: DBAPIError) -> None:
        """Waits before the next try. Raises: Refused STORE_UNAVAILABLE, DBAPIError if there have been enough."""
        if self.is_away:
            self._refuse_waiting()
        if self.is_away or self._ending.wait(_pause_s(tries)):
            raise (away() if self._database.is_lost(error) else error) from error

    def _refuse_waiting(self) -> None:
        """Refuses what is in the queue; while the database is away, nothing new comes in."""
        waiting: list[Write] = []
        ends = False
        while not self._queue.empty():
            write = self._queue.get()
            if write is None:
                ends = True
            else:
                waiting.append(write)
        if ends:
            self._queue.put(None)
        if waiting:
            outcomes = [_Outcome(write, None, away()) for write in waiting]
            self._loop.call_soon_threadsafe(self._deliver, None, outcomes)

    def _connected(self) -> Connection:
        if self._conn is None:
            self._conn = self._engine.connect()
        return self._conn

    def _drop(self) -> None:
        """Forgets the connection; one that is broken is closed without a word to the server."""
        conn, self._conn = self._conn, None
        if conn is not None:
            if self._away_since_s is not None:
                conn.invalidate()
            conn.close()

    def _note_away(self, error: DBAPIError) -> None:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            _log.warning("the store %s does not answer: %s", self._database.name, self._database.words(error))

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            _log.warning("the store answers again after %.1f s", time.monotonic() - self._away_since_s)
            self._away_since_s = None

    def _replaced(self, conn: Connection) -> StoreLost:
        lease = read_lease(conn)
        leader = "" if lease is None or lease.term == self._term else f": {lease.words()}"
        return StoreLost(f"another coordinator has taken the store {self._database.name}{leader}")

    def _shorten(self) -> None:
        """Keeps a write-ahead log short; if readers prevented that, the next try is a while later."""
        now_s = time.monotonic()
        if self._conn is None or now_s < self._log_after_s:
            return
        if not self._database.after_commit(self._conn, self._log_wait_ms):
            self._log_after_s = now_s + _LOG_REST_S

    def _spoilt(self, batch: list[Write], error: BaseException) -> list[_Outcome]:
        self._failed_commits += 1
        if isinstance(error, StoreFailure):
            self._failure = error
            refusal = Refused(Reason.STORE_UNAVAILABLE, UNUSABLE, retry_after_s=5)
            return [_Outcome(write, None, refusal) for write in batch]
        if not isinstance(error, Refused):
            method = batch[0].actor.method if batch else "renewing the lease"
            _log.error("a transaction failed (%s)", method, exc_info=error)
        return [_Outcome(write, None, error) for write in batch]

    def _deliver(self, made: _Made | None, outcomes: list[_Outcome]) -> None:
        """Delivers what was committed, or the outcomes of what was not."""
        if made is not None:
            self._tell(made.events, made.grown)
            outcomes = made.outcomes
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


def _pause_s(tries: int) -> float:
    return _AGAIN_S[min(tries, len(_AGAIN_S) - 1)]


def away() -> Refused:
    """The refusal of what cannot wait any longer for the database."""
    return Refused(Reason.STORE_UNAVAILABLE, AWAY, retry_after_s=1)
