"""The store: the truth of the service. Opens it as its only writer; operations are plain functions beside this file."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import EventRecord
from shardyard_coordinator.seams import Actor, Clock, Trace
from shardyard_coordinator.store import sqlite
from shardyard_coordinator.store.database import UNUSABLE, Database, Taken
from shardyard_coordinator.store.failures import StoreAway, StoreDead, StoreFailure, StoreLed
from shardyard_coordinator.store.postgres_url import is_postgres
from shardyard_coordinator.store.writer import MAX_AWAY_S, Writer, WriterFigures, away

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_READERS = 4
# Reads of many rows have their own threads, so that a page of jobs never delays the read of one.
_LIST_READERS = 2
_LOOK_S = 0.5
_READ_AGAIN_S = 0.1


def lock_store(url: str | Path, clock: Clock, state_dir: Path | None = None) -> sqlite.FileLock:
    """Locks the store for this process, which is quick; `open_store` then opens it, which may take seconds.

    `url` is a path, `sqlite:///` and a path, or a URL of PostgreSQL, for which only `state_dir` is locked here.
    Raises: StoreFailure (StoreLocked if another coordinator is on it), ValueError for another kind of URL.
    """
    database = database_at(url)
    path = database.path if isinstance(database, sqlite.Sqlite) else (state_dir or Path()) / "store.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(database, sqlite.Sqlite):
        sqlite.refuse_network_file_system(path.parent)
    return sqlite.FileLock(path, clock.now_us())


def database_at(url: str | Path) -> Database:
    """The database of a URL. Raises: ValueError for an unknown kind of URL, ModuleNotFoundError without psycopg."""
    text = str(url)
    if is_postgres(text):
        # Here: only PostgreSQL needs the extra.
        from shardyard_coordinator.store.postgres import Postgres

        return Postgres(text)
    if "://" in text and not text.startswith("sqlite:///"):
        raise ValueError("not a store: give a path, sqlite:/// and a path, or postgresql://USER@HOST:PORT/DATABASE")
    return sqlite.Sqlite(Path(text.removeprefix("sqlite:///")).absolute())


async def open_store(
    url: str | Path,
    clock: Clock,
    trace: Trace,
    *,
    lock: sqlite.FileLock | None = None,
    log_wait_ms: int = sqlite.LOG_WAIT_MS,
    standby: bool = False,
    patience_s: float = 60.0,
) -> Store:
    """Opens the store: migrations, checks, lease; `lock` is released if that fails. Raises: as `lock_store`.

    `log_wait_ms` is how long writers may wait for the readers of a log that is to be emptied. `standby` waits for as
    long as another process leads the store, or its server does not answer; otherwise `patience_s` is for that.
    """
    database = database_at(url)
    if lock is None and isinstance(database, sqlite.Sqlite):
        lock = lock_store(url, clock)
    try:
        await asyncio.to_thread(database.prepare)
        engine = database.write_engine()
        taken = await _taken(database, engine, clock, trace, patience_s=math.inf if standby else patience_s)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    trace.point("lease.taken")
    return Store(database, engine, taken, lock=lock, log_wait_ms=log_wait_ms)


class Store:
    """An open store. `failed` is done, with the reason, when the process must end; `file` is SQLite's."""

    def __init__(
        self,
        database: Database,
        engine: Engine,
        taken: Taken,
        *,
        lock: sqlite.FileLock | None,
        log_wait_ms: int,
    ) -> None:
        self.name = database.name
        self.file = database.path if isinstance(database, sqlite.Sqlite) else None
        self.store_id = taken.store_id
        self.secret = taken.secret
        self.term = taken.term
        self.failed: asyncio.Future[StoreFailure] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._database = database
        self._engine = engine
        self._lock = lock
        self._subscribers: list[Callable[[Sequence[EventRecord]], None]] = []
        self._metric_subscribers: list[Callable[[frozenset[str]], None]] = []
        self._reading = database.read_engine(_READERS + _LIST_READERS)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._list_readers = ThreadPoolExecutor(_LIST_READERS, thread_name_prefix="store-list-reader")
        self._writer = Writer(database, engine, taken, log_wait_ms=log_wait_ms, tell=self._tell, fail=self._fail)

    async def write(self, operation: Callable[[Connection], _T], actor: Actor, size_bytes: int = 0) -> _T:
        """Runs `operation` in the next commit; returns when it is on the disk.

        A caller that is cancelled does not cancel its operation. Raises: what the operation raised; Refused STORE_FULL,
        STORE_BUSY, STORE_UNAVAILABLE, OVERLOADED.
        """
        # A cancelled caller only cancels the future; the writer still runs the operation, and ignores the future.
        result: _T = await self._writer.submit(operation, actor, size_bytes)
        return result

    async def read(self, query: Callable[[Connection], _T]) -> _T:
        """Runs `query` on one snapshot, in a thread of the readers; it cannot write.

        Raises: what the query raised; Refused STORE_BUSY, STORE_UNAVAILABLE.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, query)

    async def read_many(self, query: Callable[[Connection], _T]) -> _T:
        """The same for reads of many rows: lists, histories, the queue."""
        return await asyncio.get_running_loop().run_in_executor(self._list_readers, self._read, query)

    def subscribe(self, callback: Callable[[Sequence[EventRecord]], None]) -> Callable[[], None]:
        """Calls back with the events of every commit, after it, in order. The returned function unsubscribes."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def subscribe_metrics(self, callback: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        """Calls back with the uids of jobs with new metrics, after each commit. The returned function unsubscribes."""
        self._metric_subscribers.append(callback)
        return lambda: self._metric_subscribers.remove(callback)

    @property
    def writer_figures(self) -> WriterFigures:
        """What the writer has done and what waits for it, for monitoring."""
        return self._writer.figures

    async def close(self) -> None:
        """Commits waiting operations, then releases the store."""
        await asyncio.to_thread(self._writer.close)
        self._readers.shutdown()
        self._list_readers.shutdown()
        self._engine.dispose()
        self._reading.dispose()
        if self._lock is not None:
            self._lock.release()
        await asyncio.sleep(0)  # Deliver the writer's last results before the callers continue.

    def _read(self, query: Callable[[Connection], _T]) -> _T:
        until_s = time.monotonic() + MAX_AWAY_S
        while True:
            if self._writer.is_away:
                raise away()
            try:
                with self._reading.connect() as conn:
                    return self._snapshot(conn, query)
            except DBAPIError as error:
                if not self._database.is_lost(error, writes=False) or time.monotonic() >= until_s:
                    raise self._read_error(error) from error
            # All connections have been lost with this one.
            self._reading.dispose()
            time.sleep(_READ_AGAIN_S)

    def _snapshot(self, conn: Connection, query: Callable[[Connection], _T]) -> _T:
        try:
            with conn.begin():
                return query(conn)
        except DBAPIError as error:
            if self._database.is_lost(error, writes=False):
                conn.invalidate()
            raise

    def _read_error(self, error: DBAPIError) -> Exception:
        found = self._database.meaning(error, writes=False)
        if isinstance(found, StoreFailure):
            self._loop.call_soon_threadsafe(self._fail, found)
            return Refused(Reason.STORE_UNAVAILABLE, UNUSABLE, retry_after_s=5)
        return found or error

    def _tell(self, events: Sequence[EventRecord], grown: frozenset[str]) -> None:
        for callback in tuple(self._subscribers):
            callback(events)
        for of_metrics in tuple(self._metric_subscribers) if grown else ():
            of_metrics(grown)

    def _fail(self, failure: StoreFailure) -> None:
        if not self.failed.done():
            self.failed.set_result(failure)


async def _taken(database: Database, engine: Engine, clock: Clock, trace: Trace, *, patience_s: float) -> Taken:
    """Waits for what may pass: another process on the file, such as a backup; a server that starts; a leader that is
    gone, but whose lease is still valid. Raises: StoreFailure.
    """
    until_s = clock.monotonic_s() + patience_s
    commits: int | None = None
    told = ""
    while True:
        try:
            return await asyncio.to_thread(_take, database, engine, clock, trace)
        except StoreLed as led:
            if patience_s < math.inf and commits is not None and led.commits != commits:
                raise  # It lives.
            commits, waits_for = led.commits, f"{led.leader} to end"
            until_s = clock.monotonic_s() + patience_s
        except Refused as refused:
            if refused.reason is Reason.STORE_FULL or clock.monotonic_s() >= until_s:
                raise _unopened(database, refused) from refused
            cause = refused.__cause__
            waits_for = f"its database: {database.words(cause) if isinstance(cause, DBAPIError) else refused}"
        if waits_for != told:
            told = waits_for
            _log.warning("the store %s waits for %s", database.name, waits_for)
        await asyncio.sleep(_LOOK_S)


def _unopened(database: Database, refused: Refused) -> StoreFailure:
    if refused.reason is Reason.STORE_FULL:
        return StoreDead(f"{database.name}: its disk is full; free some space, then start the service again")
    if refused.reason is Reason.STORE_UNAVAILABLE:
        cause = refused.__cause__
        why = f" ({database.words(cause)})" if isinstance(cause, DBAPIError) else ""
        return StoreAway(f"{database.name}: the server does not answer{why}; start it, then the service again")
    return StoreDead(
        f"{database.name}: another process holds it, a backup for instance; end that one, then start the service again"
    )


def _take(database: Database, engine: Engine, clock: Clock, trace: Trace) -> Taken:
    try:
        return database.take(engine, clock, trace)
    except DBAPIError as error:
        raise (database.meaning(error) or error) from error
