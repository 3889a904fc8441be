"""What may befall an attempt between its row and its end: storage, cluster and coordinator go away under it."""

from __future__ import annotations

import asyncio
import errno
import math
import os
from pathlib import Path

import pytest

from helpers.core import TERMINAL, Core, new_job, running_core, shown
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.protocols import StorageFailed, Unreachable
from shardyard_coordinator.store import metrics


def reason(job: JobRecord) -> str:
    return job_pb2.FailureReport.FromString(job.failure).reason


def is_unreachable(job: JobRecord) -> bool:
    return bool(job_pb2.Job.FromString(job.conditions).conditions)


async def running_job(core: Core, launcher: ScriptedLauncher) -> JobRecord:
    job = await core.submit(new_job())
    await core.when(job.uid, lambda _: bool(launcher.gangs))
    launcher.newest().canary()
    return await core.until(job.uid, JobState.RUNNING)


async def test_unreachable_set_by_one_coordinator_is_cleared_by_the_next(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await running_job(core, launcher)
        launcher.unreachable = True
        await core.when(job.uid, is_unreachable)
    launcher.unreachable = False
    async with running_core(tmp_path, launcher) as core:
        job = await core.when(job.uid, lambda job: not is_unreachable(job))
        log = await core.events(job.uid)
    assert job.state is JobState.RUNNING
    assert [event.condition.active for event in log if event.HasField("condition")] == [True, False]


async def test_unreachable_says_where_since_when_why_and_what_to_do_and_is_renewed_without_another_event(
    tmp_path: Path,
) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await running_job(core, launcher)
        launcher.silence, launcher.unreachable = "its supervisor does not answer", True
        job = await core.when(job.uid, is_unreachable)
        [first] = job_pb2.Job.FromString(job.conditions).conditions
        launcher.silence = "the cluster does not answer"
        job = await core.when(job.uid, lambda job: b"the cluster does not" in job.conditions)
        [renewed] = job_pb2.Job.FromString(job.conditions).conditions
        log = await core.events(job.uid)
    where = f"attempt 1 on {launcher.newest().launch.placement[0][0][:12]} has not answered since "
    assert first.message.startswith(where) and " UTC: its supervisor does not answer. " in first.message
    assert first.message.endswith("end the job (`shardyard cancel --lost job`)")
    assert renewed.time == first.time and renewed.message == first.message.replace("its supervisor", "the cluster")
    assert [event.condition.active for event in log if event.HasField("condition")] == [True]


async def test_an_attempt_that_was_to_start_on_a_lost_cluster_is_placed_again(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    launcher.ensure_error = Unreachable("scripted not to launch")
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, is_unreachable)
    launcher.ensure_error = None
    launcher.lose_cluster()
    launcher.script = whole_run
    async with running_core(tmp_path, launcher) as core:
        job = await core.until(job.uid, *TERMINAL)
        first, _ = await core.attempts(job.uid)
    assert (job.state, job.epoch) == (JobState.SUCCEEDED, 2)
    assert job_pb2.FailureReport.FromString(first.failure).reason == "RAY_LOST"
    assert [key.epoch for key in launcher.gangs] == [2]


async def test_a_cluster_that_is_replaced_while_a_gang_starts_is_not_given_that_gang(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(script=whole_run)
    launcher.ensure_error = Unreachable("scripted not to launch")
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, is_unreachable)
        launcher.lose_cluster()
        launcher.ensure_error = None
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.SUCCEEDED, 2)
    assert [key.epoch for key in launcher.gangs] == [2]


async def test_a_job_whose_launch_does_not_succeed_can_be_cancelled(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    launcher.ensure_error = Unreachable("scripted not to launch")
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, is_unreachable)
        await core.cancel(job)
        job = await core.until(job.uid, *TERMINAL)
    assert job.state is JobState.CANCELLED and not launcher.gangs


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.EROFS, "STORAGE_NOT_WRITABLE"),
        (errno.EACCES, "STORAGE_NOT_WRITABLE"),
        (errno.ENOENT, "STORAGE_UNAVAILABLE"),
        (errno.ESTALE, "STORAGE_UNAVAILABLE"),
        (errno.EIO, "STORAGE_UNAVAILABLE"),
    ],
)
async def test_a_folder_that_cannot_be_written_at_the_launch_pauses_the_job(
    tmp_path: Path, error: int, expected: str
) -> None:
    launcher = ScriptedLauncher()
    launcher.ensure_error = StorageFailed.of(OSError(error, os.strerror(error)))
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL, JobState.PAUSED)
        first, *_ = await core.attempts(job.uid)
    assert (job.state, reason(job)) == (JobState.PAUSED, expected)
    assert job_pb2.FailureReport.FromString(first.failure).reason == expected


async def test_a_supervisor_that_could_not_spool_is_distinguished_from_one_that_was_killed(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await running_job(core, launcher)
        folder = core.collector.settings.job_dir(job.uid)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text("in the way")
        launcher.newest().die()
        await core.when(job.uid, lambda job: job.state is not JobState.RUNNING)
        first, *_ = await core.attempts(job.uid)
    assert job_pb2.FailureReport.FromString(first.failure).reason == "STORAGE_NOT_WRITABLE"


async def test_a_failure_of_the_storage_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    def full(gang: ScriptedGang) -> None:
        path = f"{gang.launch.attempt_dir}/step-000000003"
        words = f"a checkpoint could not be written: {path}: No space left on device"
        gang.ready()
        gang.emit(failure=job_pb2.FailureReport(reason="STORAGE_FULL", message=words, metadata={"path": path}))
        gang.ended(ok=False)

    launcher = ScriptedLauncher(script=full)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda job: bool(job.failure))
        reported, *_ = await core.attempts(job.uid)
        launcher.ensure_error = StorageFailed.of(
            OSError(errno.EROFS, "Read-only file system", str(tmp_path / "storage" / "x"))
        )
        launcher.script = None
        other = await core.submit(new_job("other"))
        await core.until(other.uid, JobState.PAUSED)
        unwritable, *_ = await core.attempts(other.uid)
    first, second = (job_pb2.FailureReport.FromString(each.failure) for each in (reported, unwritable))
    place = f"<storage>/jobs/{job.uid}/e000001/step-000000003"
    assert first.metadata["path"] == place and f": {place}: No space left" in first.message
    assert "<storage>/x: Read-only file system" in second.message


async def test_a_gang_that_has_made_no_step_is_not_waited_for(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, stop_grace_s=60.0, unbegun_grace_s=0.02) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        await core.cancel(job)
        job = await core.until(job.uid, *TERMINAL, timeout_s=10.0)
    assert job.state is JobState.CANCELLED


async def test_a_gang_that_does_not_answer_is_not_late(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, start_timeout_s=0.3) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        launcher.unreachable = True
        await core.when(job.uid, is_unreachable)
        await asyncio.sleep(0.5)
        launcher.newest().canary()
        launcher.unreachable = False
        job = await core.until(job.uid, JobState.RUNNING, *TERMINAL)
        log = await core.events(job.uid)
    assert job.state is JobState.RUNNING and job.epoch == 1
    assert "attempt STOPPING" not in [shown(event) for event in log]


async def test_a_loss_that_is_not_a_number_is_not_the_best(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await running_job(core, launcher)
        for step, loss in [(1, float("nan")), (2, 0.5), (3, float("nan"))]:
            launcher.newest().checkpoint(step, loss=loss)
        job = await core.when(job.uid, lambda job: job.latest_checkpoint.endswith("s3"))
    assert job.best_checkpoint.endswith("e1-s2")


async def test_only_an_evaluation_of_all_samples_is_the_jobs_number(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await running_job(core, launcher)
        gang = launcher.newest()
        gang.evaluation(2, is_partial=True, loss=0.1, accuracy=1.0)
        gang.evaluation(5, loss=0.7, accuracy=0.6, mcc=math.nan)
        gang.evaluation(9, is_final=True, loss=0.5, accuracy=0.8)
        job = await core.when(job.uid, lambda job: b"accuracy" in job.evaluation and step_of(job) == 9)
        uid = job.uid
        accuracy, loss = await core.store.read(lambda conn: metrics.query_metrics(conn, uid, []))
        log = await core.events(job.uid)
    assert [shown(event) for event in log].count("evaluation") == 3
    assert (accuracy.metric, loss.metric) == ("eval/accuracy", "eval/loss")
    assert [(point.step, point.value) for point in accuracy.points] == [(5, 0.6), (9, 0.8)]


def step_of(job: JobRecord) -> int:
    return job_pb2.Evaluation.FromString(job.evaluation).step
