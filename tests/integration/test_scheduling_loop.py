"""The loop: whole gangs, by priority and submission, and every wait with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection

from helpers.clock import ManualClock
from helpers.core import ACTOR, NoWait, assert_dense, new_job, running_core, shown
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.protocols import AttemptKey, Node
from shardyard_coordinator.scheduling.loop import LOOK_ON_S, TELL_ON_S
from shardyard_coordinator.store import submissions

FOUR = (Node("node-1", "127.0.0.1", 4, 0, 1 << 30),)
PENDING = job_pb2.PendingInfo


def pending(job: JobRecord) -> job_pb2.PendingInfo:
    return PENDING.FromString(job.pending)


async def test_a_gang_waits_for_all_its_slots_and_says_how_many_are_missing(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(nodes=FOUR)
    async with running_core(tmp_path, launcher) as core:
        first = await core.submit(new_job("first", workers=3))
        await core.until(first.uid, JobState.PREPARING)
        second = await core.submit(new_job("second", workers=2))
        waiting = await core.when(second.uid, lambda job: bool(job.pending))
        assert pending(waiting).constraint == PENDING.CONSTRAINT_INSUFFICIENT_SLOTS
        assert (pending(waiting).needed_slots, pending(waiting).free_slots, pending(waiting).position) == (2, 1, 1)
        assert await core.loop.cluster_slots(await core.launcher.cluster()) == (4, 1)
        third = await core.submit(new_job("third", workers=1))
        await core.until(third.uid, JobState.PREPARING)
        await core.when(second.uid, lambda job: pending(job).free_slots == 0)
        await core.when(first.uid, lambda _: AttemptKey(first.uid, 1) in launcher.gangs)
        whole_run(launcher.gangs[AttemptKey(first.uid, 1)])
        started = await core.until(second.uid, JobState.PREPARING)
        log = await core.events(second.uid)
        assert await core.loop.cluster_slots(await core.launcher.cluster()) == (4, 1)
    assert_dense(log)
    assert [shown(event) for event in log][:3] == ["QUEUED", "pending", "PREPARING"]
    assert not started.pending


async def test_the_higher_priority_starts_first_then_the_earlier_submission(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(nodes=FOUR, script=whole_run)
    async with running_core(tmp_path, launcher, schedule=False) as core:
        made = [
            await core.submit(new_job(name, workers=4, priority=priority))
            for name, priority in [
                ("low", job_pb2.PRIORITY_BEST_EFFORT),
                ("early", job_pb2.PRIORITY_NORMAL),
                ("late", job_pb2.PRIORITY_NORMAL),
                ("high", job_pb2.PRIORITY_HIGH),
            ]
        ]
        core.loop.start()
        for job in made:
            await core.until(job.uid, JobState.SUCCEEDED)
    order = [gang.spec.job_name.rsplit("/", 1)[1] for gang in launcher.gangs.values()]
    assert order == ["high", "early", "late", "low"]


async def test_what_no_node_could_hold_waits_with_that_reason_until_one_comes(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(nodes=FOUR)
    async with running_core(tmp_path, launcher, schedule=False) as core:
        job = await core.submit(new_job(workers=8))
        await core.loop.step()
        assert pending(await core.job(job.uid)).constraint == PENDING.CONSTRAINT_NO_SUCH_NODE
        launcher.nodes = (*FOUR, Node("node-2", "127.0.0.2", 4, 0, 1 << 30))
        await core.loop.step()
        job = await core.until(job.uid, JobState.PREPARING)
        await core.when(job.uid, lambda _: bool(launcher.gangs))
    assert launcher.newest().launch.placement == (("node-1", 4), ("node-2", 4))


async def test_without_a_cluster_everything_waits_and_says_so(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(script=whole_run)
    launcher.unreachable = True
    async with running_core(tmp_path, launcher, schedule=False) as core:
        job = await core.submit(new_job())
        await core.loop.step()
        assert pending(await core.job(job.uid)).constraint == PENDING.CONSTRAINT_CLUSTER_UNREACHABLE
        launcher.unreachable = False
        await core.loop.step()
        await core.until(job.uid, JobState.SUCCEEDED)


@pytest.mark.parametrize("is_set_back", [False, True])
async def test_a_back_off_is_waited_for_by_the_clock_and_over_if_it_was_set_back_by_years(
    tmp_path: Path, is_set_back: bool
) -> None:
    class Longest(NoWait):
        def uniform(self, a: float, b: float) -> float:
            return max(a, b)

    def script(gang: ScriptedGang) -> None:
        if gang.launch.key.epoch > 1:
            whole_run(gang)
            return
        gang.failure("HUNG", step=3)
        gang.ended(ok=False)

    clock = ManualClock()
    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher, schedule=False, clock=clock, rng=Longest()) as core:
        job = await core.submit(new_job())
        await core.loop.step()
        job = await core.when(job.uid, lambda job: job.state is JobState.QUEUED and job.epoch == 1)
        left_s = await core.loop.step()
        assert left_s is not None and 9 <= left_s <= 10
        info = pending(await core.job(job.uid))
        assert info.constraint == PENDING.CONSTRAINT_NOT_BEFORE
        if is_set_back:
            clock.jump_wall(-10 * 365 * 86_400)
        else:
            clock.advance(11)
        await core.loop.step()
        await core.until(job.uid, JobState.SUCCEEDED)


async def test_a_queue_longer_than_one_pass_is_reported_whole_with_every_jobs_place(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(nodes=FOUR)
    clock = ManualClock()
    async with running_core(tmp_path, launcher, schedule=False, clock=clock) as core:
        await core.submit(new_job("first", workers=4))
        await core.loop.step()

        def line(conn: Connection) -> list[JobRecord]:
            made = [new_job(f"job-{at}") for at in range(600)]
            return [submissions.create_job(conn, new, ACTOR, 1).job for new in made]

        waiting = await core.store.write(line, ACTOR)
        passes = 0
        while await core.loop.step() == TELL_ON_S:
            passes += 1
        assert passes == 2
        infos = [pending(await core.job(job.uid)) for job in waiting]
        assert [info.position for info in infos] == list(range(1, 601))
        assert {info.constraint for info in infos} == {PENDING.CONSTRAINT_INSUFFICIENT_SLOTS}
        for job in waiting[::100]:
            assert [shown(event) for event in await core.events(job.uid)] == ["QUEUED", "pending"]
        launcher.unreachable = True
        while await core.loop.step() == TELL_ON_S:
            pass
        last = pending(await core.job(waiting[-1].uid))
        assert last.constraint == PENDING.CONSTRAINT_CLUSTER_UNREACHABLE


async def test_places_deep_in_a_long_line_are_brought_up_to_date_in_time(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(nodes=FOUR)
    clock = ManualClock()
    async with running_core(tmp_path, launcher, schedule=False, clock=clock) as core:
        await core.submit(new_job("first", workers=4))

        def line(conn: Connection) -> list[JobRecord]:
            return [submissions.create_job(conn, new_job(f"job-{at}"), ACTOR, 1).job for at in range(2000)]

        waiting = await core.store.write(line, ACTOR)
        while await core.loop.step() == TELL_ON_S:
            pass
        await core.cancel(waiting[0])
        left_s = await core.loop.step()
        assert pending(await core.job(waiting[1].uid)).position == 1
        assert pending(await core.job(waiting[-1].uid)).position == 2000
        passes = 1
        while pending(await core.job(waiting[-1].uid)).position == 2000:
            assert left_s == LOOK_ON_S
            left_s = await core.loop.step()
            passes += 1
        assert passes <= 5
        assert pending(await core.job(waiting[1000].uid)).position == 1000


async def test_a_slot_that_comes_free_behind_a_long_queue_does_not_wait_until_every_job_has_its_reason(
    tmp_path: Path,
) -> None:
    launcher = ScriptedLauncher(nodes=FOUR)
    async with running_core(tmp_path, launcher, schedule=False) as core:
        first = await core.submit(new_job("first", workers=4))
        await core.loop.step()

        def line(conn: Connection) -> list[JobRecord]:
            made = [new_job(f"job-{at}", workers=5 if at < 4000 else 4) for at in range(4002)]
            return [submissions.create_job(conn, new, ACTOR, 1).job for new in made]

        waiting = await core.store.write(line, ACTOR)
        core.loop.start()
        await core.when(first.uid, lambda _: bool(launcher.gangs))
        await core.when(waiting[200].uid, lambda job: bool(job.pending))
        whole_run(launcher.gangs[AttemptKey(first.uid, 1)])
        await core.until(waiting[4000].uid, JobState.PREPARING, timeout_s=10)
        # Most of those before it had no reason yet: it did not wait for that.
        assert not (await core.job(waiting[3900].uid)).pending
        assert (await core.job(waiting[4001].uid)).state is JobState.QUEUED


async def test_all_that_fits_starts_in_one_pass(tmp_path: Path) -> None:
    many = tuple(Node(f"node-{at}", f"127.0.0.{at}", 8, 0, 1 << 30) for at in range(1, 21))
    launcher = ScriptedLauncher(nodes=many)
    async with running_core(tmp_path, launcher, schedule=False) as core:

        def line(conn: Connection) -> list[JobRecord]:
            made = [new_job(f"job-{at}", workers=(200, 4)[at % 2]) for at in range(1300)]
            return [submissions.create_job(conn, new, ACTOR, 1).job for new in made]

        waiting = await core.store.write(line, ACTOR)
        await core.loop.step()
        states = {job.state for job in [await core.job(each.uid) for each in waiting[1:80:2]]}
        assert states == {JobState.PREPARING}
        assert (await core.job(waiting[81].uid)).state is JobState.QUEUED
        assert await core.loop.cluster_slots(await core.launcher.cluster()) == (160, 0)
