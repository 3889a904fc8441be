"""What a store of 100,000 jobs needs: every list and all live attempts from an index, lists next to single reads."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from alembic import command
from alembic.config import Config
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select

from helpers.clock import ManualClock
from helpers.core import ACTOR, new_job, running_core
from helpers.scripted_launcher import ScriptedLauncher
from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import Condition, EventKind, MetricPoint
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store import (
    attempts,
    encode,
    events,
    jobs,
    listing,
    metrics,
    migrate,
    sqlite,
    submissions,
    tables,
)
from shardyard_coordinator.store.store import Store, open_store


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(tmp_path / "store.db", ManualClock(), NullTrace())
    yield opened
    await opened.close()


def plan_of(conn: Connection, statement: Any) -> list[str]:
    text = str(statement.compile(dialect=conn.dialect, compile_kwargs={"literal_binds": True}))
    return [row[3] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]


LISTS: list[tuple[str, Mapping[str, Any], bool]] = [
    ("newest", {}, True),
    ("by end", {"order_by": "end_time"}, True),
    ("by priority", {"order_by": "priority"}, True),
    ("by name", {"order_by": "display_name"}, True),
    ("of a state", {"conditions": [Condition("state", "=", "FAILED")]}, True),
    ("not of a state", {"conditions": [Condition("state", "!=", "FAILED")]}, True),
    ("of a label", {"conditions": [Condition("labels.team", "=", "nlp")]}, True),
    ("of a label and a state", {"conditions": [Condition("labels.a", "=", "b"), Condition("state", "=", "X")]}, True),
    ("with a label", {"conditions": [Condition("labels.team", ":", "*")]}, True),
    ("without a label", {"conditions": [Condition("labels.team", "!=", "nlp")]}, True),
    ("of a priority", {"conditions": [Condition("priority", "=", 3)]}, True),
    ("of a creator", {"conditions": [Condition("creator", "=", "me")]}, True),
    ("with a word", {"conditions": [Condition("display_name", ":", "bert")]}, True),
    ("ended since", {"conditions": [Condition("end_time", ">", 5)]}, True),
    ("ended since, by end", {"conditions": [Condition("end_time", ">", 5)], "order_by": "end_time"}, True),
    ("of a state by end", {"conditions": [Condition("state", "=", "FAILED")], "order_by": "end_time"}, False),
    ("of a task by name", {"conditions": [Condition("task", "=", "x")], "order_by": "display_name"}, False),
]


@pytest.mark.parametrize("after", [None, (7, 7)], ids=["first page", "later page"])
@pytest.mark.parametrize(("asked", "in_order"), [each[1:] for each in LISTS], ids=[each[0] for each in LISTS])
async def test_every_list_is_found_in_an_index_alone(
    store: Store, asked: Mapping[str, Any], in_order: bool, after: tuple[int, int] | None
) -> None:
    given = {"conditions": (), "order_by": "create_time", "desc": True, "limit": 50, "full": False, **asked}
    if after is not None and given["order_by"] == "display_name":
        after = ("n", 7)  # type: ignore[assignment]
    statement = listing.jobs_statement("default", after=after, **given)
    plan = await store.read(lambda conn: plan_of(conn, statement))
    found = plan[1 : plan.index("SCAN anon_1")] if "SCAN anon_1" in plan else plan
    assert [step for step in found if "job" in step and "COVERING INDEX" not in step] == []
    assert not any("SCAN job" in step for step in plan)
    assert in_order == ("USE TEMP B-TREE FOR ORDER BY" not in found)
    if after is not None and in_order and not given["conditions"]:
        # A later page begins in the middle of the index; it does not count up to it.
        assert any("<?" in step for step in found)


async def test_live_attempts_are_found_without_a_look_at_the_others(store: Store) -> None:
    def read(conn: Connection) -> list[str]:
        sql, _, _ = attempts._LIVE.compiled(conn.dialect)
        assert attempts.live_attempts(conn) == []
        return [row[3] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}")]

    [plan] = await store.read(read)
    assert "attempt_live" in plan


async def test_lists_that_take_long_keep_no_other_read_waiting(store: Store) -> None:
    job = (await store.write(lambda conn: submissions.create_job(conn, new_job(), ACTOR, 1), ACTOR)).job
    go_on = threading.Event()
    lists = [asyncio.create_task(store.read_many(lambda _: go_on.wait(20))) for _ in range(16)]
    try:
        async with asyncio.timeout(10):
            found = await store.read(lambda conn: jobs.get_job(conn, "default", "job"))
    finally:
        go_on.set()
    assert found == job
    assert all(await asyncio.gather(*lists))


async def test_labels_of_jobs_from_before_are_found_after_the_migration(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    engine = sqlite.write_engine(path)
    with engine.connect() as conn:
        config = Config()
        config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = conn
        command.upgrade(config, "0001")
    engine.dispose()
    with sqlite3.connect(path) as old:
        for at, name in enumerate("abc", 1):
            row = (at, f"u{at}", "default", name, "QUEUED", 10 - at)
            old.execute("INSERT INTO job (id, uid, project, job_id, state, create_us) VALUES (?, ?, ?, ?, ?, ?)", row)
            old.execute("INSERT INTO event (job_uid, sequence, kind, payload) VALUES (?, 1, 1, x'')", (f"u{at}",))
            old.execute("UPDATE job SET last_sequence = 1")
            if name != "b":
                old.execute("INSERT INTO label (job_uid, key, value) VALUES (?, 'team', 'nlp')", (f"u{at}",))
    old.close()
    store = await open_store(path, ManualClock(), NullTrace())
    try:
        nlp = [Condition("labels.team", "=", "nlp")]
        listed = [
            [job.job_id for job in await store.read(lambda c, more=more: listing.list_jobs(c, "default", **more))]
            for more in ({"conditions": nlp}, {"conditions": nlp, "order_by": "priority"}, {})
        ]
        assert listed == [["a", "c"], ["c", "a"], ["a", "b", "c"]]
        gone = await store.write(
            lambda conn: jobs.request_cancel(conn, "default", "a", "", actor=ACTOR, now_us=2), ACTOR
        )
        assert gone.state is JobState.CANCELLED
    finally:
        await store.close()


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), max_size=12), st.integers(1, 25))
def test_events_expire_in_batches_that_together_are_all_of_them(jobs_: list[tuple[int, int]], most: int) -> None:
    expired = [events.Expired(at, f"u{at}", oldest, oldest + more) for at, (oldest, more) in enumerate(jobs_)]
    left = {each.job_uid: set(range(each.oldest, each.last + 1)) for each in expired}
    for batch in events.in_batches(expired, most):
        removed = 0
        for uid, below in batch:
            gone = {sequence for sequence in left[uid] if sequence < below}
            left[uid] -= gone
            removed += len(gone)
        assert 0 < removed <= most
    assert left == {each.job_uid: {each.last} for each in expired}


async def test_a_job_of_many_events_is_expired_and_purged_a_part_at_a_time(tmp_path: Path) -> None:
    async with running_core(tmp_path, ScriptedLauncher(), schedule=False, event_retention_s=1.0) as core:
        job = await core.submit(new_job())
        draft = encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=1)))
        points = [MetricPoint(1, step, 0, 0.5) for step in range(201_000)]

        def grow(conn: Connection) -> None:
            events.append(conn, job.uid, [draft] * 11_000, 1)
            metrics.add_points(conn, job.uid, "loss", points)
            moved = jobs.request_cancel(conn, "default", "job", "", actor=ACTOR, now_us=2)
            jobs.change_job(conn, moved.uid, 2, {"end_us": 2})

        await core.store.write(grow, ACTOR)
        before = await core.store.read(commits)
        await core.collector.retention.sweep()
        [last] = await core.store.read(lambda conn: events.events_after(conn, job.uid, 0, 20_000))
        assert last.kind is EventKind.STATE
        assert await core.store.read(commits) - before >= 3
        assert await core.store.read(lambda conn: events.expired_events(conn, 1 << 60)) == []
        await core.store.write(lambda c: jobs.delete_job(c, "default", "job", "", actor=ACTOR, now_us=3), ACTOR)
        await core.store.write(lambda conn: events.append(conn, job.uid, [draft] * 6000, 4) and None, ACTOR)
        before = await core.store.read(commits)
        await core.collector.retention.sweep()
        assert await core.store.read(commits) - before >= 2
        assert await core.store.read(lambda conn: jobs.deleted_jobs(conn, 1 << 60)) == []
        assert await core.store.read(lambda conn: metrics.metric_names(conn, job.uid)) == []


def commits(conn: Connection) -> int:
    return int(conn.execute(select(tables.lease.c.commits)).scalar_one())


async def test_the_write_ahead_log_stays_short_under_readers_that_overlap(tmp_path: Path) -> None:
    # A busy machine may let no reader end in the usual quarter of a second, and then it is not tried again for a while.
    store = await open_store(tmp_path / "store.db", ManualClock(), NullTrace(), log_wait_ms=10_000)
    log, done, longest = tmp_path / "store.db-wal", asyncio.Event(), 0

    def look(conn: Connection) -> int:
        counted = conn.execute(select(func.count()).select_from(tables.plan)).scalar_one()
        time.sleep(0.02)  # Others keep starting to read, so there is always a reader.
        return counted + conn.execute(select(func.count()).select_from(tables.plan)).scalar_one()

    async def reader(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while not done.is_set():
            await store.read(look)

    readers = [asyncio.create_task(reader(at * 0.006)) for at in range(4)]
    for at in range(12):
        plans = [{"fingerprint": f"{at}-{each}".encode(), "result": b"x" * 1_000_000} for each in range(10)]
        await store.write(lambda conn, plans=plans: conn.execute(tables.plan.insert(), plans) and None, ACTOR)
        longest = max(longest, log.stat().st_size)
    done.set()
    await asyncio.gather(*readers)
    assert longest < 2 * sqlite.MAX_LOG_BYTES < 12 * 10_000_000
    assert await store.read(look) == 240
    await store.close()


async def test_gathered_statistics_do_not_mislead_a_list(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store.db", ManualClock(), NullTrace())

    def fill(conn: Connection) -> None:
        made = [new_job(f"job-{at}", labels={"team": f"t{at % 3}"}, display_name="same") for at in range(600)]
        submissions.create_jobs(conn, [submissions.Submission(new, ACTOR) for new in made], 1)
        conn.exec_driver_sql("ANALYZE")

    await store.write(fill, ACTOR)
    await store.close()
    analysed = await open_store(store.name, ManualClock(), NullTrace())
    for name, asked, _ in LISTS:
        given = {"conditions": (), "order_by": "create_time", "desc": True, "limit": 50, "full": False, **asked}
        statement = listing.jobs_statement("default", after=None, **given)
        plan = await analysed.read(lambda conn, statement=statement: plan_of(conn, statement))
        found = plan[: plan.index("SCAN anon_1")]
        assert [step for step in found if "job" in step and "COVERING INDEX" not in step] == [], name
    await analysed.close()
