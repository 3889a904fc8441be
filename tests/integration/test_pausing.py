"""Pausing and resuming a job in every state it can be in, by a person or because a person has to act."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from helpers.clock import ManualClock
from helpers.core import ACTOR, TERMINAL, Core, assert_dense, new_job, running_core, states
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import VERDICTS, Cause
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.store import attempts, jobs


def listening() -> ScriptedLauncher:
    launcher = ScriptedLauncher()
    launcher.ignores_directives = False
    return launcher


async def test_a_queued_job_is_paused_at_once_and_keeps_its_place(tmp_path: Path) -> None:
    launcher = listening()
    async with running_core(tmp_path, launcher, schedule=False) as core:
        job = await core.submit(new_job())
        first, second = await core.pause(job), await core.pause(job)
        assert first.state is JobState.PAUSED and first == second
        resumed, again = await core.resume(job), await core.resume(job)
        log = await core.events(job.uid)
    assert resumed.state is JobState.QUEUED and resumed == again and resumed.id == job.id
    assert states(log) == ["QUEUED", "PAUSED", "QUEUED"]
    assert log[-1].state.message == "resumed by local; it continues from the start"


async def test_a_running_job_makes_a_checkpoint_frees_its_slots_and_continues_from_it(tmp_path: Path) -> None:
    launcher = listening()
    async with running_core(tmp_path, launcher) as core:
        job = await _running(core, launcher, step=5)
        asked = await core.pause(job)
        assert asked.state is JobState.PAUSING and asked == await core.pause(job)
        job = await core.until(job.uid, JobState.PAUSED)
        assert await core.store.read(attempts.live_attempts) == []
        [directive] = launcher.newest().directives
        launcher.script = lambda gang: whole_run(gang, steps=8)
        await core.resume(job)
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
        first, second = await core.attempts(job.uid)
    assert_dense(log)
    assert (directive.action, directive.reason) == (worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP, "PAUSED")
    assert job.state is JobState.SUCCEEDED and job.recomputed_steps == 0
    assert states(log)[2:6] == ["RUNNING", "PAUSING", "PAUSED", "QUEUED"]
    said = [event.state.message for event in log if event.state.to == job_pb2.STATE_PAUSED]
    assert said == ["a resume continues from the checkpoint at step 5"]
    assert first.failure == b"" and job.failures == 0 and second.resumed_from_step == 5


async def test_a_gang_before_its_first_step_is_ended_without_a_checkpoint(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, unbegun_grace_s=0.05) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        assert (await core.pause(job)).state is JobState.PAUSING
        job = await core.until(job.uid, JobState.PAUSED)
    assert launcher.newest().launch.key in launcher.killed
    assert job.failure == b"" and not job.latest_checkpoint


async def test_a_gang_that_does_not_listen_is_ended_by_force_after_its_time(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, pause_grace_s=0.05) as core:
        job = await _running(core, launcher, step=5, checkpoint=3)
        await core.pause(job)
        job = await core.until(job.uid, JobState.PAUSED)
        log = await core.events(job.uid)
    assert log[-1].state.message == "a resume continues from the checkpoint at step 3"
    assert launcher.newest().launch.key in launcher.killed


async def test_a_job_that_recovers_is_paused_once_its_gang_is_confirmed_gone(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, poll_s=0.02) as core:
        job = await _running(core, launcher)
        launcher.kills_fail = True
        launcher.newest().die()
        await core.until(job.uid, JobState.RECOVERING)
        assert (await core.pause(job)).state is JobState.PAUSING
        assert [each.state for each in await core.attempts(job.uid)] == [AttemptState.STOPPING]
        launcher.kills_fail = False
        job = await core.until(job.uid, JobState.PAUSED)
    assert job.epoch == 1


async def test_a_gang_that_is_lost_while_it_pauses_leaves_a_paused_job(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, poll_s=0.02) as core:
        job = await _running(core, launcher, step=5, checkpoint=3)
        await core.pause(job)
        await core.when(job.uid, lambda _: bool(launcher.newest().directives))
        launcher.newest().die()
        job = await core.until(job.uid, JobState.PAUSED)
    assert job_pb2.FailureReport.FromString(job.failure).reason == "WORKER_LOST"


async def test_a_failure_that_cannot_be_fixed_fails_a_pausing_job_too(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _running(core, launcher)
        await core.pause(job)
        launcher.newest().failure("USER_CONFIG")
        launcher.newest().ended(ok=False)
        job = await core.until(job.uid, JobState.PAUSED, *TERMINAL)
    assert job.state is JobState.FAILED


async def test_a_pause_is_followed_by_a_cancel(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, stop_grace_s=0.05) as core:
        job = await _running(core, launcher, step=3)
        await core.pause(job)
        await core.when(job.uid, lambda _: bool(launcher.newest().directives))
        assert (await core.cancel(job)).state is JobState.CANCELLING
        with pytest.raises(Refused) as refused:
            await core.pause(job)
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.CANCELLED
    assert [each.reason for each in launcher.newest().directives] == ["PAUSED", "CANCELLED"]
    assert refused.value.reason is Reason.INVALID_STATE


async def test_a_paused_job_is_cancelled_at_once_but_not_deleted(tmp_path: Path) -> None:
    async with running_core(tmp_path, ScriptedLauncher(), schedule=False) as core:
        job = await core.pause(await core.submit(new_job()))
        with pytest.raises(Refused) as refused:
            await core.store.read(lambda conn: jobs.delete_job(conn, "default", "job", "", actor=ACTOR, now_us=1))
        assert "cancel it first" in refused.value.message
        job = await core.cancel(job)
    assert job.state is JobState.CANCELLED


async def test_a_result_that_is_being_written_is_not_paused(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _running(core, launcher)
        launcher.newest().finished(10)
        await core.until(job.uid, JobState.FINALIZING)
        with pytest.raises(Refused) as refused:
            await core.pause(job)
    assert refused.value.reason is Reason.INVALID_STATE
    assert "wait for it, or cancel it" in refused.value.message


async def test_a_training_that_is_over_before_it_hears_of_the_pause_is_given_all_its_time(tmp_path: Path) -> None:
    launcher, clock = ScriptedLauncher(), ManualClock()
    async with running_core(tmp_path, launcher, clock=clock, poll_s=0.02) as core:
        job = await _running(core, launcher, step=9)
        gang = launcher.newest()
        await core.pause(job)
        await core.when(job.uid, lambda _: bool(gang.directives))
        gang.finished(10)
        await core.until(job.uid, JobState.FINALIZING)
        clock.advance(10_000)
        gang.evaluation(10, is_final=True, loss=0.5)
        await core.when(job.uid, lambda job: bool(job.evaluation))
        gang.exported()
        gang.ended()
        job = await core.until(job.uid, JobState.PAUSED, *TERMINAL)
        log = await core.events(job.uid)
    assert states(log)[-4:] == ["RUNNING", "PAUSING", "FINALIZING", "SUCCEEDED"]


@pytest.mark.parametrize("cause", [each for each in Cause if VERDICTS[each].needs_person])
async def test_a_failure_that_a_person_can_fix_pauses_the_job_with_its_report_and_checkpoints(
    tmp_path: Path, cause: Cause
) -> None:
    mended = False

    def script(gang: ScriptedGang) -> None:
        if mended:
            whole_run(gang, steps=8)
            return
        gang.canary()
        if gang.launch.key.epoch == 1:
            gang.checkpoint(4)
        gang.progress(6)
        gang.failure(cause.value, step=6)
        gang.ended(ok=False)

    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, JobState.PAUSED, *TERMINAL)
        report = job_pb2.FailureReport.FromString(job.failure)
        log = await core.events(job.uid)
        assert (job.state, report.reason, report.step) == (JobState.PAUSED, cause.value, 6)
        assert "shardyard resume job" in report.next_step and log[-1].state.failure == report
        assert job.latest_checkpoint.endswith("e1-s4") and not job.end_us
        mended = True
        await core.resume(job)
        job = await core.until(job.uid, *TERMINAL)
        last = (await core.attempts(job.uid))[-1]
    assert (job.state, last.resumed_from_step, job.failure) == (JobState.SUCCEEDED, 4, b"")


async def test_a_gang_that_dies_while_it_pauses_says_that_a_resume_is_the_next_step(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _running(core, launcher, step=5)
        await core.pause(job)
        launcher.newest().failure("WORKER_LOST", rank=1, step=5)
        launcher.newest().ended(ok=False)
        job = await core.until(job.uid, JobState.PAUSED, *TERMINAL)
    report = job_pb2.FailureReport.FromString(job.failure)
    assert (job.state, report.reason) == (JobState.PAUSED, "WORKER_LOST")
    assert report.next_step == "resume the job (`shardyard resume job`): it continues from the start"


async def test_a_resume_gives_back_all_tries(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.failure("EXPORT_FAILED", step=gang.launch.key.epoch)
        gang.ended(ok=False)

    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, JobState.PAUSED)
        assert job.epoch == 4
        await core.resume(job)
        job = await core.when(job.uid, lambda job: job.epoch == 8 and job.state is JobState.PAUSED)


async def test_a_full_disk_is_tried_again_by_itself_and_pauses_the_job_when_that_did_not_help(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.failure("STORAGE_FULL", step=3)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, JobState.PAUSED)
    assert job.epoch == 1 + (VERDICTS[Cause.STORAGE_FULL].retries or 0)


async def test_checkpoints_found_damaged_are_read_again_and_a_run_never_starts_over(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        if gang.launch.key.epoch == 1:
            gang.canary()
            gang.checkpoint(2)
            gang.failure("WORKER_LOST")
        else:
            corrupt = job_pb2.CheckpointChanged.CHANGE_CORRUPT
            gang.emit(checkpoint=worker_pb2.CheckpointReport(change=corrupt, epoch=1, step=2, message="xxh3"))
            gang.failure("CHECKPOINT_CORRUPT")
        gang.ended(ok=False)

    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, JobState.PAUSED)
        launcher.script = None
        await core.resume(job)
        await core.when(job.uid, lambda _: launcher.newest().launch.key.epoch == 3)
    [candidate] = launcher.newest().spec.resume_candidates
    assert candidate.endswith("e000001/step-000000002")


@pytest.mark.parametrize("state", [JobState.PREPARING, JobState.RUNNING, JobState.FINALIZING, *TERMINAL[:2]])
async def test_only_a_paused_job_is_resumed(tmp_path: Path, state: JobState) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        if state is JobState.FAILED:
            gang.failure("USER_CONFIG")
            gang.ended(ok=False)
        elif state is JobState.SUCCEEDED:
            whole_run(gang)
        elif state is not JobState.PREPARING:
            gang.canary()
        if state is JobState.FINALIZING:
            gang.finished(3)
        await core.until(job.uid, state)
        with pytest.raises(Refused) as refused:
            await core.resume(job)
    assert refused.value.reason is Reason.INVALID_STATE and refused.value.metadata["state"] == state.value


async def test_a_pause_that_was_recorded_is_carried_out_by_the_next_start(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await _running(core, launcher, step=4)
        launcher.unreachable = True
        await core.pause(job)
    launcher.unreachable, launcher.ignores_directives = False, False
    async with running_core(tmp_path, launcher) as core:
        job = await core.until(job.uid, JobState.PAUSED)
        assert job.latest_checkpoint.endswith("e1-s4")
        while core.collector.following:  # Until the gang is let go.
            await asyncio.sleep(0.01)
    async with running_core(tmp_path, launcher) as core:
        assert (await core.job(job.uid)).state is JobState.PAUSED and not core.collector.following
        await core.resume(job)
        await core.until(job.uid, JobState.PREPARING)


async def test_a_gang_that_was_never_launched_does_not_count_as_lost_in_a_pause(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, schedule=False) as core:
        job = await core.submit(new_job())
        await core.store.write(
            lambda conn: attempts.start_attempt(
                conn, job, [("node-1", 1)], cluster_id="cluster-1", export_uid="e" * 32, now_us=1
            ),
            ACTOR,
        )
        await core.pause(job)
    async with running_core(tmp_path, launcher) as core:
        job = await core.until(job.uid, JobState.PAUSED)
        [attempt] = await core.attempts(job.uid)
    assert (job.failure, attempt.failure, launcher.gangs) == (b"", b"", {})


async def test_the_time_of_a_pause_does_not_count_as_run_time(tmp_path: Path) -> None:
    clock, launcher, spec = ManualClock(), listening(), spec_pb2.JobSpec()
    spec.max_run_time.FromSeconds(100)
    async with running_core(tmp_path, launcher, clock=clock) as core:
        job = await core.submit(new_job(spec=spec))
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        launcher.newest().canary()
        launcher.newest().progress(5)
        await core.when(job.uid, lambda job: job.last_step == 5)
        clock.advance(90)
        await core.pause(job)
        job = await core.until(job.uid, JobState.PAUSED)
        clock.advance(1000)
        launcher.script = lambda gang: whole_run(gang, steps=8)
        await core.resume(job)
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.SUCCEEDED


async def _running(core: Core, launcher: ScriptedLauncher, *, step: int = 0, checkpoint: int = 0) -> JobRecord:
    job = await core.submit(new_job())
    await core.when(job.uid, lambda _: bool(launcher.gangs))
    gang = launcher.newest()
    gang.canary()
    if checkpoint:
        gang.checkpoint(checkpoint)
    if step:
        gang.progress(step)
        await core.when(job.uid, lambda job: job.last_step == step)
    return await core.until(job.uid, JobState.RUNNING)
