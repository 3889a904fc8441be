"""What is tried again, how often, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.core import TERMINAL, new_job, running_core
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2, spec_pb2
from shardyard_coordinator.domain.states import JobState


async def test_a_users_mistake_fails_at_once(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.failure("USER_CONFIG", step=1)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
    assert (job.state, job.epoch) == (JobState.FAILED, 1)
    report = job_pb2.FailureReport.FromString(job.failure)
    assert report.reason == "USER_CONFIG" and report.next_step
    assert log[-1].state.failure == report


async def test_retry_max_bounds_the_attempts(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.failure("HUNG", step=gang.launch.key.epoch)
        gang.ended(ok=False)

    spec = spec_pb2.JobSpec()
    spec.retry.max = 0
    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job(spec=spec))
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.FAILED, 1)


BUDGETS = [
    ("HUNG", lambda epoch: 10 * epoch, False, 4),
    ("HUNG", lambda epoch: 10 * epoch, True, 4),
    ("UNKNOWN", lambda epoch: 10 * epoch, True, 3),
    ("HOST_OOM", lambda epoch: 10 * epoch, False, 2),
    ("WORKER_LOST", lambda epoch: 10 * epoch, False, 6),
    ("WORKER_LOST", lambda _epoch: 7, True, 3),
    ("A_NEW_CAUSE", lambda epoch: 10 * epoch, False, 3),
]


REPEATS = [
    ("UNKNOWN", "KeyError: 7", {}, 2),
    ("UNKNOWN", "rank 1 of pid {epoch} fell", {}, 2),
    ("ENGINE_START_TIMEOUT", "waited 900 s for the engine", {}, 2),
    ("WORKER_LOST", "rank 0 was ended by SIGSEGV", {"signal": "SIGSEGV"}, 2),
    ("WORKER_LOST", "rank 0 was ended by SIGKILL", {"signal": "SIGKILL"}, 6),
    ("NODE_LOST", "node a is gone", {}, 6),
]


@pytest.mark.parametrize(("reason", "message", "metadata", "attempts"), REPEATS)
async def test_a_failure_that_cannot_change_is_tried_once_more_at_most(
    tmp_path: Path, reason: str, message: str, metadata: dict[str, str], attempts: int
) -> None:
    def script(gang: ScriptedGang) -> None:
        words = message.format(epoch=gang.launch.key.epoch)
        gang.emit(failure=job_pb2.FailureReport(reason=reason, message=words, metadata=metadata))
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.FAILED, attempts)


async def test_the_same_words_at_another_step_are_another_failure(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.failure("UNKNOWN", step=gang.launch.key.epoch)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.FAILED, 3)


async def test_a_recovering_job_says_what_it_continues_from(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        if gang.launch.key.epoch == 3:
            whole_run(gang, steps=8)
            return
        if gang.launch.key.epoch == 2:
            gang.checkpoint(5)
        gang.failure("WORKER_LOST", step=gang.launch.key.epoch)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
    said = [event.state.message for event in log if event.state.to == job_pb2.STATE_RECOVERING]
    assert said == ["continues from the start", "continues from the checkpoint at step 5"]


async def test_the_next_step_of_a_lost_worker_is_what_then_happens(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.failure("WORKER_LOST", step=gang.launch.key.epoch)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        waiting = await core.when(job.uid, lambda job: job.state is JobState.QUEUED and job.epoch == 1)
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
    assert job_pb2.FailureReport.FromString(waiting.failure).next_step == "nothing: the job continues from the start"
    assert (log[-1].state.to, job.state) == (job_pb2.STATE_FAILED, JobState.FAILED)
    assert log[-1].state.failure.next_step == "look at the end of its log, then submit the job again"


@pytest.mark.parametrize(("reason", "step", "commits", "attempts"), BUDGETS)
async def test_a_cause_has_its_budget_and_the_same_step_three_times_is_a_loop(
    tmp_path: Path, reason: str, step: Callable[[int], int], commits: bool, attempts: int
) -> None:
    def script(gang: ScriptedGang) -> None:
        epoch = gang.launch.key.epoch
        if commits:
            gang.checkpoint(epoch)
        gang.failure(reason, step=step(epoch))
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.FAILED, attempts)


async def test_a_lost_worker_is_replaced_as_often_as_checkpoints_are_made(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        epoch = gang.launch.key.epoch
        if epoch > 12:
            whole_run(gang, steps=20)
            return
        gang.checkpoint(epoch)
        gang.failure("WORKER_LOST", step=epoch)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
    assert (job.state, job.epoch) == (JobState.SUCCEEDED, 13)
