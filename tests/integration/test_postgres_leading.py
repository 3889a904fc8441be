"""One writer on PostgreSQL: who leads, who waits, and what becomes of a commit whose outcome was lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from itertools import count

import pytest
from sqlalchemy import Connection, select

from helpers.core import ACTOR, new_job
from helpers.lost_commits import commit_through, num_jobs, opened, submit
from helpers.postgres import Server, postgres_server
from helpers.repository import ROOT
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import submissions, tables
from shardyard_coordinator.store.failures import StoreLed
from shardyard_coordinator.store.store import open_store

_numbers = count()
ELSEWHERE = '{"pid": 77, "host": "elsewhere", "place": "another boot", "start_ticks": 1}'


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    return server.database(f"leading{next(_numbers)}")


async def test_a_second_coordinator_ends_and_names_the_first(url: str) -> None:
    async with opened(url) as first:
        with pytest.raises(StoreLed) as led:
            await open_store(url, SystemClock(), NullTrace())
        await submit(first, "goes-on")
    assert led.value.exit_code == 75
    words = str(led.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, since " in words and "--standby" in words


async def test_a_standby_waits_for_as_long_as_the_leader_lives_and_then_serves(url: str) -> None:
    async with opened(url) as first:
        waiting = asyncio.create_task(open_store(url, SystemClock(), NullTrace(), standby=True))
        await asyncio.sleep(3.0)
        assert not waiting.done()
        await submit(first, "by-the-first")
    begun = time.monotonic()
    second = await waiting
    assert time.monotonic() - begun < 9.0, "the lease was given up, not waited for"
    assert second.term == first.term + 1 and await second.read(num_jobs) == 1
    await second.close()


async def test_a_lease_of_a_machine_that_is_gone_ends_by_the_databases_clock(server: Server, url: str) -> None:
    async with opened(url):
        pass
    name = url.rpartition("/")[2]
    now = "(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint"
    server.execute(f"UPDATE lease SET holder = '{ELSEWHERE}', until_us = {now} + 2000000", database=name)
    begun = time.monotonic()
    async with opened(url) as second:
        assert time.monotonic() - begun > 1.0 and second.term == 2
    # A lease that lasts longer than any is from before the clock was set back: nobody waits for it.
    server.execute(f"UPDATE lease SET holder = '{ELSEWHERE}', until_us = {now} + 3600000000", database=name)
    async with opened(url) as third:
        assert third.term == 3


async def test_a_frozen_leader_is_replaced_and_changes_no_row_when_it_wakes(server: Server, url: str) -> None:
    environment = {**os.environ, "SHARDYARD_TEST_STORE_URL": url, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "helpers.submitting_run", str(ROOT), "frozen"]
    pipe = asyncio.subprocess.PIPE
    leader = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        assert leader.stdout is not None and leader.stderr is not None
        acknowledged = [await leader.stdout.readline() for _ in range(20)]
        leader.send_signal(signal.SIGSTOP)
        # As if its time had run out; a transaction in flight holds the row for up to five seconds.
        server.execute("UPDATE lease SET until_us = 0", database=url.rpartition("/")[2])
        async with opened(url) as second:
            before = await second.read(num_jobs)
            leader.send_signal(signal.SIGCONT)
            acknowledged += (await leader.stdout.read()).splitlines(keepends=True)
            said = (await leader.stderr.read()).decode()
            assert await leader.wait() == 75
            assert f"another coordinator has taken the store {second.name}: process {os.getpid()} on" in said
            assert await second.read(num_jobs) == before >= len(acknowledged) >= 20
            uids = set(await second.read(lambda conn: list(conn.execute(select(tables.job.c.uid)).scalars())))
            assert {line.decode().strip() for line in acknowledged} <= uids
    finally:
        if leader.returncode is None:
            leader.kill()
            await leader.wait()


async def test_a_commit_whose_reply_was_lost_is_neither_lost_nor_made_twice(server: Server, url: str) -> None:
    eaten, jobs = await commit_through(server, url, eaten=8, rng=random.Random(3))
    assert eaten >= 8 and jobs >= 4


async def test_writes_survive_connections_that_the_server_ends(server: Server, url: str) -> None:
    name, uids = url.rpartition("/")[2], list[str]()
    async with opened(url) as store:
        for at in range(5):
            writes = [asyncio.create_task(submit(store, f"job-{at}-{each}")) for each in range(8)]
            end = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
            )
            await asyncio.to_thread(server.execute, end, database=name, values=[name])
            uids += await asyncio.gather(*writes)
            assert await store.read(num_jobs) == len(set(uids)) == 8 * (at + 1)


async def test_a_crash_of_the_server_is_waited_for_and_loses_nothing(server: Server, url: str) -> None:
    async with opened(url) as store:
        writes = [asyncio.create_task(submit(store, f"job-{each}")) for each in range(30)]
        await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(server.stop, "immediate")
        more = [asyncio.create_task(submit(store, f"more-{each}")) for each in range(10)]
        await asyncio.to_thread(server.start)
        uids = await asyncio.gather(*writes, *more)
        assert await store.read(num_jobs) == len(set(uids)) == 40
        assert not store.failed.done()


async def test_a_server_that_stays_away_is_not_waited_for_and_is_used_when_it_is_back(server: Server, url: str) -> None:
    async with opened(url) as store:
        await asyncio.to_thread(server.stop, "immediate")
        new = new_job("late")
        begun = time.monotonic()
        for at_once in (False, True):
            with pytest.raises(Refused) as refused:
                await store.write(lambda conn: submissions.create_job(conn, new, ACTOR, 1), ACTOR)
            assert refused.value.reason is Reason.STORE_UNAVAILABLE and refused.value.retry_after_s
            assert str(server.port) not in str(refused.value), "where the store is does not concern a caller"
            assert at_once or time.monotonic() - begun >= 5.0
        with pytest.raises(Refused, match="does not answer"):
            await store.read(num_jobs)
        await asyncio.to_thread(server.start)
        await submit(store, "back")
        assert await store.read(num_jobs) == 1


async def test_a_server_that_has_become_a_standby_is_left_for_the_primary(url: str) -> None:
    runs = count()

    def write(conn: Connection) -> int:
        if (run := next(runs)) == 0:  # As on a connection that was made before a failover.
            conn.exec_driver_sql("SET TRANSACTION READ ONLY")
        submissions.create_job(conn, new_job("moved"), ACTOR, 1)
        return run

    async with opened(url) as store:
        assert await store.write(write, ACTOR) == 1
        assert await store.read(num_jobs) == 1


async def test_a_lock_of_another_session_is_waited_for_and_concerns_no_later_write(server: Server, url: str) -> None:
    name = url.rpartition("/")[2]
    async with opened(url) as store:
        await submit(store, "first")
        hold = "BEGIN; LOCK TABLE job; SELECT pg_sleep(3); COMMIT"
        holder = asyncio.create_task(asyncio.to_thread(server.execute, hold, database=name))
        await asyncio.sleep(0.5)
        assert await asyncio.gather(submit(store, "second"), submit(store, "third"))
        await holder
        assert await store.read(num_jobs) == 3
