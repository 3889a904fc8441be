"""Many gangs at once: their events share commits, and what is known is not read again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, select

from helpers.core import assert_dense, new_job, running_core
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.protocols import AttemptKey, Node
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.store import Store

GANGS = 60
NODES = (Node("node-1", "127.0.0.1", GANGS, 0, 1 << 30),)


def begun(gang: ScriptedGang) -> None:
    gang.canary()


async def progress_of(store: Store, count: int, act: Any) -> None:
    """Returns when so many progress events have been published since `act` was called."""
    seen, enough = [0], asyncio.Event()

    def hear(records: Sequence[EventRecord]) -> None:
        seen[0] += sum(record.kind is EventKind.PROGRESS for record in records)
        if seen[0] >= count:
            enough.set()

    unsubscribe = store.subscribe(hear)
    try:
        act()
        async with asyncio.timeout(20):
            await enough.wait()
    finally:
        unsubscribe()


def commits(conn: Connection) -> int:
    return int(conn.execute(select(tables.lease.c.commits)).scalar_one())


async def test_events_that_come_at_once_share_their_commits(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(nodes=NODES, script=begun)
    async with running_core(tmp_path, launcher) as core:
        made = [await core.submit(new_job(f"job-{at}")) for at in range(GANGS)]
        for job in made:
            await core.until(job.uid, JobState.RUNNING)
        before = await core.store.read(commits)

        def everybody() -> None:
            for gang in launcher.gangs.values():
                gang.progress(2)

        await progress_of(core.store, GANGS, everybody)
        spent = await core.store.read(commits) - before
        # A fault of one gang does not affect the others: its events have a gap, the others continue.
        odd = launcher.gangs[AttemptKey(made[0].uid, 1)]
        odd.progress(3)
        odd.events[-1].sequence += 5
        for gang in launcher.gangs.values():
            if gang is not odd:
                whole_run(gang, steps=6)
        for job in made[1:]:
            await core.until(job.uid, JobState.SUCCEEDED)
        assert_dense(await core.events(made[1].uid))
        assert (await core.job(made[0].uid)).state is JobState.RUNNING
    assert spent <= GANGS / 4


async def test_progress_alone_does_not_make_the_job_be_read_again(tmp_path: Path) -> None:
    reads: list[Connection] = []
    launcher = ScriptedLauncher(nodes=NODES, script=begun)
    async with running_core(tmp_path, launcher, schedule=False) as core:
        job = await core.submit(new_job())
        await core.loop.step()
        await core.until(job.uid, JobState.RUNNING)
        gang = launcher.newest()
        await progress_of(core.store, 1, lambda: gang.progress(1))
        readers = core.store._reading
        # How often a snapshot of the store is taken.
        event.listen(readers, "begin", reads.append)
        for step in range(2, 22):
            await progress_of(core.store, 1, lambda step=step: gang.progress(step))
        taken = len(reads)
        await core.cancel(job)
        await core.when(job.uid, lambda _: bool(gang.directives))
    assert taken <= 2 < len(reads)
