"""What a store of 100,000 jobs needs: every list and all live attempts from an index, lists beside single reads."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from helpers.clock import ManualClock
from helpers.core import ACTOR, new_job
from shardyard_coordinator.domain.records import Condition
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store import attempts, jobs, listing, migrate, sqlite, submissions
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
