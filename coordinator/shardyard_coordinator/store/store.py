"""The store: the truth of the service. Opens it as its only writer; operations are plain functions beside this file."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import EventRecord
from shardyard_coordinator.seams import Actor, Clock, Trace
from shardyard_coordinator.store import sqlite, tables
from shardyard_coordinator.store.failures import StoreBroken, StoreDead, StoreFailure
from shardyard_coordinator.store.migrate import migrate
from shardyard_coordinator.store.writer import Writer

_T = TypeVar("_T")
_READERS = 4
# Reads of many rows have their own threads, so that a page of jobs never delays the read of one.
_LIST_READERS = 2
_BUSY_START_S = 60.0
_CHECKED_JOBS = 1000


def lock_store(url: str | Path, clock: Clock) -> sqlite.FileLock:
    """Locks the store for this process, which is quick; `open_store` then opens it, which may take seconds.

    `url` is a path or `sqlite:///` and a path. Raises: StoreFailure (StoreLocked if another coordinator is on it),
    ValueError for another kind of URL.
    """
    path = _path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    sqlite.refuse_network_file_system(path.parent)
    return sqlite.FileLock(path, clock.now_us())


async def open_store(
    url: str | Path,
    clock: Clock,
    trace: Trace,
    *,
    lock: sqlite.FileLock | None = None,
    log_wait_ms: int = sqlite.LOG_WAIT_MS,
) -> Store:
    """Opens the store: migrations, checks, lease; `lock` is released if that fails. Raises: as `lock_store`.

    `log_wait_ms` is how long writers may wait for the readers of a log that is to be emptied.
    """
    path = _path(url)
    lock = lock or lock_store(url, clock)
    try:
        await asyncio.to_thread(sqlite.read_ahead, path)
        engine = sqlite.write_engine(path)
        conn, term, store_id, secret = await _taken(engine, path, clock, trace)
    except BaseException:
        lock.release()
        raise
    return Store(
        path, engine, conn, lock=lock, term=term, store_id=store_id, secret=secret, clock=clock, log_wait_ms=log_wait_ms
    )


class Store:
    """An open store. `failed` is done, with the reason, when the process must end."""

    def __init__(
        self,
        path: Path,
        engine: Engine,
        conn: Connection,
        *,
        lock: sqlite.FileLock,
        term: int,
        store_id: str,
        secret: bytes,
        clock: Clock,
        log_wait_ms: int,
    ) -> None:
        self.path = path
        self.store_id = store_id
        self.secret = secret
        self.term = term
        self.failed: asyncio.Future[StoreFailure] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._conn = conn
        self._lock = lock
        self._subscribers: list[Callable[[Sequence[EventRecord]], None]] = []
        self._metric_subscribers: list[Callable[[frozenset[str]], None]] = []
        self._reading = sqlite.read_engine(path, _READERS + _LIST_READERS)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._list_readers = ThreadPoolExecutor(_LIST_READERS, thread_name_prefix="store-list-reader")
        self._writer = Writer(
            conn, path=path, term=term, clock=clock, log_wait_ms=log_wait_ms, tell=self._tell, fail=self._fail
        )

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

    async def close(self) -> None:
        """Commits waiting operations, then releases the store."""
        await asyncio.to_thread(self._writer.close)
        self._readers.shutdown()
        self._list_readers.shutdown()
        self._conn.close()
        self._engine.dispose()
        self._reading.dispose()
        self._lock.release()
        await asyncio.sleep(0)  # Deliver the writer's last results before the callers continue.

    def _read(self, query: Callable[[Connection], _T]) -> _T:
        try:
            with self._reading.begin() as conn:
                return query(conn)
        except DBAPIError as error:
            found = sqlite.meaning(error, self.path, writes=False)
            if isinstance(found, StoreFailure):
                self._loop.call_soon_threadsafe(self._fail, found)
                found = Refused(Reason.STORE_UNAVAILABLE, sqlite.UNUSABLE, retry_after_s=5)
            raise (found or error) from error

    def _tell(self, events: Sequence[EventRecord], grown: frozenset[str]) -> None:
        for callback in tuple(self._subscribers):
            callback(events)
        for of_metrics in tuple(self._metric_subscribers) if grown else ():
            of_metrics(grown)

    def _fail(self, failure: StoreFailure) -> None:
        if not self.failed.done():
            self.failed.set_result(failure)


def _path(url: str | Path) -> Path:
    text = str(url)
    if "://" in text and not text.startswith("sqlite:///"):
        raise ValueError(f"{text!r} is not a store: give a path, or sqlite:/// and a path")
    return Path(text.removeprefix("sqlite:///")).absolute()


async def _taken(engine: Engine, path: Path, clock: Clock, trace: Trace) -> tuple[Connection, int, str, bytes]:
    """Waits if another process holds the file, such as a backup. Raises: StoreFailure."""
    until_s = clock.monotonic_s() + _BUSY_START_S
    while True:
        try:
            return await asyncio.to_thread(_take, engine, path, clock, trace)
        except Refused as refused:
            if refused.reason is not Reason.STORE_BUSY or clock.monotonic_s() >= until_s:
                raise StoreDead(_unopened(path, refused)) from refused
            await asyncio.sleep(1.0)


def _unopened(path: Path, refused: Refused) -> str:
    if refused.reason is Reason.STORE_FULL:
        return f"{path}: its disk is full; free some space, then start the service again"
    return f"{path}: another process holds it, a backup for instance; end that one, then start the service again"


def _take(engine: Engine, path: Path, clock: Clock, trace: Trace) -> tuple[Connection, int, str, bytes]:
    conn = None
    try:
        conn = engine.connect()
        migrate(conn, trace)
        _check(conn, path)
        with conn.begin():
            term = _take_lease(conn, clock)
            store_id, secret = _identity(conn, clock)
    except DBAPIError as error:
        if conn is not None:
            conn.close()
        raise (sqlite.meaning(error, path) or error) from error
    trace.point("lease.taken")
    return conn, term, store_id, secret


def _check(conn: Connection, path: Path) -> None:
    """The file is sound, and the newest jobs' events are dense. Raises: StoreBroken."""
    with conn.begin():
        verdict = conn.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if verdict != "ok":
            raise StoreBroken(f"{path} is damaged: {verdict}; restore it from a backup")
        job, event = tables.job.c, tables.event.c
        newest = select(job.uid, job.last_sequence).order_by(job.id.desc()).limit(_CHECKED_JOBS).subquery()
        statement = (
            select(
                newest.c.uid, newest.c.last_sequence, func.count(), func.min(event.sequence), func.max(event.sequence)
            )
            .join(tables.event, event.job_uid == newest.c.uid)
            .group_by(newest.c.uid, newest.c.last_sequence)
        )
        for uid, last, count, first, newest_sequence in conn.execute(statement):
            if newest_sequence != last or count != last - first + 1:
                raise StoreBroken(
                    f"{path}: the events of job {uid} have a hole: {count} from {first} to {newest_sequence}, "
                    f"but the last is {last}; restore it from a backup"
                )


def _take_lease(conn: Connection, clock: Clock) -> int:
    row = conn.execute(select(tables.lease.c.term).where(tables.lease.c.id == 1)).first()
    if row is None:
        conn.execute(insert(tables.lease).values(id=1))
    term = 1 if row is None else row.term + 1
    holder = f"{os.getpid()}@{socket.gethostname()}"
    now = clock.now_us()
    values = {"term": term, "commits": 0, "holder": holder, "since_us": now, "until_us": now}
    conn.execute(update(tables.lease).where(tables.lease.c.id == 1).values(**values))
    return term


def _identity(conn: Connection, clock: Clock) -> tuple[str, bytes]:
    row = conn.execute(select(tables.meta.c.store_id, tables.meta.c.secret)).first()
    if row is not None:
        return row.store_id, row.secret
    made = {"store_id": secrets.token_hex(16), "secret": secrets.token_bytes(32)}
    conn.execute(insert(tables.meta).values(id=1, create_us=clock.now_us(), **made))
    return made["store_id"], made["secret"]  # type: ignore[return-value]
