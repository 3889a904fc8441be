"""Ways to end a job early, in every state it can be in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from helpers.clock import ManualClock
from helpers.core import TERMINAL, Core, assert_dense, new_job, running_core, states
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2, spec_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.launch.protocols import AttemptKey
from shardyard_coordinator.store import attempts


async def test_a_queued_job_is_cancelled_at_once_and_again_without_effect(tmp_path: Path) -> None:
    async with running_core(tmp_path, ScriptedLauncher(), schedule=False) as core:
        job = await core.submit(new_job())
        first, second = await core.cancel(job), await core.cancel(job)
        log = await core.events(job.uid)
    assert first.state is JobState.CANCELLED and first == second
    assert states(log) == ["QUEUED", "CANCELLED"]


@pytest.mark.parametrize("state", [JobState.PREPARING, JobState.RUNNING, JobState.FINALIZING])
async def test_a_gang_is_asked_to_stop_and_cancelled_once_it_has(tmp_path: Path, state: JobState) -> None:
    launcher = ScriptedLauncher()
    launcher.ignores_directives = False
    async with running_core(tmp_path, launcher) as core:
        job = await _brought_to(core, launcher, state)
        asked = await core.cancel(job)
        assert asked.state is JobState.CANCELLING
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
        [attempt] = await core.attempts(job.uid)
    assert_dense(log)
    assert states(log)[-2:] == ["CANCELLING", "CANCELLED"]
    assert [each.reason for each in launcher.newest().directives] == ["CANCELLED"]
    assert attempt.state is AttemptState.ENDED and not attempt.failure and not job.failure


async def test_a_job_that_recovers_is_cancelled_once_its_gang_is_confirmed_gone(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, poll_s=0.02) as core:
        job = await _brought_to(core, launcher, JobState.RUNNING)
        launcher.kills_fail = True
        launcher.newest().die()
        await core.until(job.uid, JobState.RECOVERING)
        asked = await core.cancel(job)
        assert asked.state is JobState.CANCELLING
        launcher.kills_fail = False
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
    assert states(log)[-3:] == ["RECOVERING", "CANCELLING", "CANCELLED"]


async def test_a_gang_that_does_not_listen_is_ended_by_force(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, stop_grace_s=0.05) as core:
        job = await _brought_to(core, launcher, JobState.RUNNING)
        await core.cancel(job)
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.CANCELLED
    assert launcher.newest().launch.key in launcher.killed


async def test_a_cancel_meets_a_gang_that_ends_well_by_itself(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _brought_to(core, launcher, JobState.FINALIZING)
        await core.cancel(job)
        launcher.newest().exported()
        launcher.newest().ended()
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.CANCELLED


@pytest.mark.parametrize("outcome", [JobState.SUCCEEDED, JobState.FAILED])
async def test_what_has_ended_otherwise_cannot_be_cancelled(tmp_path: Path, outcome: JobState) -> None:
    launcher = ScriptedLauncher(script=whole_run if outcome is JobState.SUCCEEDED else _fail)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.until(job.uid, outcome)
        with pytest.raises(Refused) as refused:
            await core.cancel(job)
    assert refused.value.reason is Reason.INVALID_STATE
    assert refused.value.metadata["state"] == outcome.value


async def test_max_run_time_fails_the_job_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    spec = spec_pb2.JobSpec()
    spec.max_run_time.FromMilliseconds(50)
    launcher = ScriptedLauncher()
    launcher.ignores_directives = False
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job(spec=spec))
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.canary()
        gang.progress(1)
        gang.checkpoint(1)
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.FAILED
    assert job_pb2.FailureReport.FromString(job.failure).reason == "MAX_RUN_TIME"
    assert job.latest_checkpoint.endswith("e1-s1")


async def test_a_gang_that_never_gets_to_its_canary_is_tried_twice(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    launcher.ignores_directives = False
    async with running_core(tmp_path, launcher, start_timeout_s=0.05) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.FAILED, 2)
    assert job_pb2.FailureReport.FromString(job.failure).reason == "ENGINE_START_TIMEOUT"


async def test_a_start_takes_as_long_as_it_likes_while_the_gang_says_how_far_it_is(tmp_path: Path) -> None:
    launcher, clock = ScriptedLauncher(), ManualClock()
    async with running_core(tmp_path, launcher, clock=clock, start_timeout_s=10.0) as core:
        job = await _brought_to(core, launcher, JobState.PREPARING)
        gang = launcher.newest()
        for turn in range(4):
            gang.emit(phase=job_pb2.PhaseStarted(phase="reference", message=f"{turn} of 4"))
            await _recorded(core, job, gang)
            clock.advance(6.0)
        gang.canary()
        await core.until(job.uid, JobState.RUNNING)
        assert not gang.directives


async def test_a_failed_gang_that_does_not_end_is_ended_by_force(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, failure_grace_s=0.05) as core:
        job = await _brought_to(core, launcher, JobState.RUNNING)
        launcher.newest().failure("USER_CONFIG", rank=1)
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.FAILED
    assert job_pb2.FailureReport.FromString(job.failure).reason == "USER_CONFIG"


async def test_a_gang_that_cannot_be_reached_is_declared_lost_and_ended_when_the_cluster_is_back(
    tmp_path: Path,
) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _brought_to(core, launcher, JobState.RUNNING)
        launcher.unreachable = True
        await core.when(job.uid, lambda job: bool(job.conditions))
        job = await core.cancel(job, lost=True)
        assert job.state is JobState.CANCELLED and not job.conditions
        assert await core.store.read(attempts.live_attempts) == []
        assert (await core.cancel(job, lost=True)).state is JobState.CANCELLED
        log = await core.events(job.uid)
        [attempt] = await core.attempts(job.uid)
        assert launcher.killed == []
    assert_dense(log)
    assert states(log)[-2:] == ["CANCELLING", "CANCELLED"]
    assert log[-1].state.message == "attempt 1 was declared lost by local"
    assert job_pb2.FailureReport.FromString(attempt.failure).reason == "RAY_LOST" and not attempt.released
    launcher.unreachable = False
    async with running_core(tmp_path, launcher) as core:
        async with asyncio.timeout(10):
            while core.collector.following:
                await asyncio.sleep(0.01)
        [attempt] = await core.attempts(job.uid)
        assert await core.events(job.uid) == log
    assert attempt.released and launcher.killed == [launcher.newest().launch.key]


class SlowToLetGo(ScriptedLauncher):
    """A question that is called off takes a moment to end."""

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        try:
            return await super().events_after(key, after, timeout_s=timeout_s, limit=limit)
        except asyncio.CancelledError:
            await asyncio.sleep(0.3)
            raise

    async def kill(self, key: AttemptKey) -> None:
        self._reach()


async def test_a_coordinator_that_stops_while_a_gang_is_let_go_does_stop(tmp_path: Path) -> None:
    launcher = SlowToLetGo()
    async with asyncio.timeout(20):
        async with running_core(tmp_path, launcher, stop_grace_s=0.02) as core:
            job = await _brought_to(core, launcher, JobState.RUNNING)
            await core.cancel(job)
            await core.until(job.uid, JobState.CANCELLED)
            launcher.unreachable = True
            await asyncio.sleep(0.05)


async def test_a_cancel_that_the_cluster_never_confirms_is_ended_by_declaring_the_gang_lost(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _brought_to(core, launcher, JobState.RUNNING)
        launcher.unreachable = True
        await core.cancel(job)
        await core.when(job.uid, lambda job: bool(job.conditions))
        job = await core.cancel(job, lost=True)
        log = await core.events(job.uid)
    assert job.state is JobState.CANCELLED and states(log).count("CANCELLING") == 1


async def test_a_gang_that_answers_is_not_lost_whatever_others_report(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _brought_to(core, launcher, JobState.RUNNING)
        with pytest.raises(Refused) as refused:
            await core.cancel(job, lost=True)
        assert (await core.job(job.uid)).state is JobState.RUNNING
        queued = await core.submit(new_job("other", workers=99))
        assert (await core.cancel(queued, lost=True)).state is JobState.CANCELLED
    assert refused.value.reason is Reason.INVALID_STATE
    assert "cancel it without `lost`" in refused.value.message


def _fail(gang: ScriptedGang) -> None:
    gang.failure("USER_CONFIG")
    gang.ended(ok=False)


async def _brought_to(core: Core, launcher: ScriptedLauncher, state: JobState) -> JobRecord:
    job = await core.submit(new_job())
    await core.when(job.uid, lambda job: bool(launcher.gangs) and job.state is not JobState.QUEUED)
    gang = launcher.newest()
    gang.ready()
    if state is not JobState.PREPARING:
        gang.canary()
    if state is JobState.FINALIZING:
        gang.finished(3)
    return await core.until(job.uid, state)


async def _recorded(core: Core, job: JobRecord, gang: ScriptedGang) -> None:
    """Returns when everything that the gang has said is recorded."""
    async with asyncio.timeout(20):
        while (await core.attempts(job.uid))[-1].high_water < len(gang.events):
            await asyncio.sleep(0.01)
