"""The one writer: what reaches whom when a transaction as a whole goes wrong, and what PostgreSQL would read."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, event, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.sql import ClauseElement

from helpers.clock import ManualClock
from helpers.core import ACTOR, add_model, new_job, running_core
from helpers.scripted_launcher import ScriptedLauncher, whole_run
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Condition
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store import (
    attempts,
    events,
    jobs,
    lease,
    listing,
    metrics,
    queue,
    resources,
    submissions,
    tables,
    writer,
)
from shardyard_coordinator.store.failures import StoreLost
from shardyard_coordinator.store.sql import Prepared, PreparedInsert, PreparedUpdate
from shardyard_coordinator.store.store import Store, open_store


async def opened(folder: Path) -> Store:
    return await open_store(folder / "store.db", ManualClock(), NullTrace())


async def test_a_newer_lease_ends_the_writer_and_nothing_is_written(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    steal = lambda conn: conn.execute(update(tables.lease).values(term=99))  # noqa: E731
    await store.write(steal, ACTOR)
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            await store.write(lambda conn: submissions.create_job(conn, new_job(), ACTOR, 1), ACTOR)
        assert refused.value.reason is Reason.STORE_UNAVAILABLE
    assert isinstance(await store.failed, StoreLost)
    assert await store.read(lambda conn: listing.list_jobs(conn, "default")) == []
    await store.close()


@pytest.mark.parametrize(
    ("code", "reason"), [(sqlite3.SQLITE_FULL, Reason.STORE_FULL), (sqlite3.SQLITE_BUSY, Reason.STORE_BUSY)]
)
async def test_a_full_or_busy_disk_refuses_the_whole_batch_and_the_next_one_continues(
    tmp_path: Path, code: int, reason: Reason
) -> None:
    store = await opened(tmp_path)

    def fail(_conn: Any) -> None:
        raise OperationalError("COMMIT", {}, _sqlite_error(code))

    create = lambda conn: submissions.create_job(conn, new_job(), ACTOR, 1)  # noqa: E731
    results = await asyncio.gather(store.write(create, ACTOR), store.write(fail, ACTOR), return_exceptions=True)
    refused = results[1]
    assert isinstance(refused, Refused) and refused.reason is reason
    assert str(tmp_path) not in str(refused), "where the store lies is nothing to a caller"
    assert not store.failed.done()
    later = await store.write(lambda conn: submissions.create_job(conn, new_job("later"), ACTOR, 1), ACTOR)
    assert later.job.job_id == "later"
    await store.close()


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY])
async def test_a_disk_that_fails_ends_the_process_and_the_operator_alone_reads_where(tmp_path: Path, code: int) -> None:
    store = await opened(tmp_path)

    def fail(_conn: Any) -> None:
        raise OperationalError("COMMIT", {}, _sqlite_error(code))

    with pytest.raises(Refused) as refused:
        await store.write(fail, ACTOR)
    assert refused.value.reason is Reason.STORE_UNAVAILABLE and str(tmp_path) not in str(refused.value)
    failure = await store.failed
    assert failure.exit_code == 74
    assert str(failure).startswith(store.name) and "start the service again" in str(failure)
    await store.close()


async def test_a_caller_that_leaves_does_not_cancel_its_write(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    task = asyncio.create_task(store.write(lambda conn: submissions.create_job(conn, new_job(), ACTOR, 1), ACTOR))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.write(lambda conn: None, ACTOR)
    assert len(await store.read(lambda conn: listing.list_jobs(conn, "default"))) == 1
    await store.close()


async def test_too_many_waiting_writes_are_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    with pytest.raises(Refused) as refused:
        await store.write(lambda conn: None, ACTOR, size_bytes=writer.MAX_WAITING_BYTES + 1)
    assert refused.value.reason is Reason.OVERLOADED
    await store.close()


async def test_a_reader_cannot_write(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    with pytest.raises(OperationalError, match="readonly"):
        await store.read(lambda conn: conn.execute(update(tables.lease).values(term=5)))
    await store.close()


async def test_identity_stays_and_the_term_rises(tmp_path: Path) -> None:
    first = await opened(tmp_path)
    await first.close()
    second = await opened(tmp_path)
    await second.close()
    assert (second.store_id, second.secret) == (first.store_id, first.secret)
    assert len(first.store_id) == 32 and len(first.secret) == 32
    assert second.term == first.term + 1


async def test_the_migrations_make_the_tables_that_the_code_knows(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await store.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    with engine.connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn), tables.metadata) == []
        kept = "sqlite_autoincrement"
        made = dict(conn.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'table'").all())
        for table in tables.metadata.sorted_tables:
            assert ("AUTOINCREMENT" in made[table.name]) == bool(table.dialect_options["sqlite"]["autoincrement"]), kept


async def test_every_statement_that_runs_compiles_for_postgresql(tmp_path: Path) -> None:
    """Caught as they run: a whole life of a job, and every kind of list."""
    seen: list[ClauseElement] = []

    def catch(_conn: Any, element: Any, *_rest: Any) -> None:
        if isinstance(element, ClauseElement):
            seen.append(element)

    event.listen(Engine, "before_execute", catch)
    try:
        async with running_core(tmp_path, ScriptedLauncher(script=whole_run)) as core:
            await core.store.write(add_model, ACTOR)
            job = await core.submit(new_job(labels={"a": "b"}, uses=("projects/default/models/m",)))
            await core.until(job.uid, JobState.SUCCEEDED)
            conditions = [Condition(field, "=", "x") for field in ("state", "labels.a")]
            conditions += [Condition(field, ":", "x") for field in ("queue", "labels.a")]

            def read(conn: Any) -> None:
                for order in ("create_time", "end_time", "display_name", "priority"):
                    listing.list_jobs(conn, "default", conditions=conditions, order_by=order, after=(1, 1))
                metrics.query_metrics(conn, job.uid, [])
                metrics.metrics_after(conn, job.uid, [], {}, 10)
                resources.stale_uploads(conn, 1)
                attempts.list_attempts(conn, job.uid)

            await core.store.read(read)
            expired = await core.store.read(lambda conn: events.expired_events(conn, 10**18))
            await core.store.write(lambda conn: events.remove_events(conn, next(events.in_batches(expired))), ACTOR)
            await core.store.write(
                lambda conn: jobs.delete_job(conn, "default", "job", "", actor=ACTOR, now_us=1), ACTOR
            )
            await core.store.write(lambda conn: jobs.purge_job(conn, job.uid), ACTOR)
    finally:
        event.remove(Engine, "before_execute", catch)
    modules = (attempts, events, jobs, lease, metrics, queue, submissions)
    hot = [each for module in modules for each in vars(module).values()]
    prepared = [each for each in hot if isinstance(each, Prepared)]
    prepared += [each.of(2) for each in hot if isinstance(each, PreparedInsert)]
    prepared += [each.of(("state",)) for each in hot if isinstance(each, PreparedUpdate)]
    assert len(seen) > 50 and len(prepared) > 12
    dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]
    for element in [*seen, *(each.statement for each in prepared)]:
        assert str(element.compile(dialect=dialect))


def _sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("scripted")
    error.sqlite_errorcode = code
    return error
