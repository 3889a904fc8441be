"""Killed at each named point, a coordinator that starts again leaves nothing undone, lost or done twice."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from helpers.core import assert_dense, new_job, running_core, shown, states
from helpers.crashing_run import SPEC, run_with_checkpoints
from helpers.repository import ROOT
from helpers.scripted_launcher import ScriptedLauncher, whole_run
from helpers.stores import begin_without_tables, change_by_hand, of_child, store_at
from shardyard.v1 import job_pb2, spec_pb2
from shardyard_coordinator.domain.records import CheckpointState
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import checkpoints
from shardyard_coordinator.store.failures import StoreBroken, StoreLed, StoreLocked, StoreTooNew
from shardyard_coordinator.store.store import open_store

POINTS = [
    "job.inserted",
    "job.committed",
    "decide.done",
    "attempt.recorded",
    "attempt.launched",
    "attempt.confirmed",
    "events.read",
    "checkpoint.recorded",
    "model.recorded",
    "events.inserted",
    "events.committed",
    "events.acked",
    "terminal.committed",
    "delete.recorded",
    "delete.unlinked",
    "lease.taken",
    "migration.applied",
]


@pytest.mark.parametrize("point", POINTS)
async def test_a_coordinator_killed_at_any_point_continues_when_it_starts_again(tmp_path: Path, point: str) -> None:
    if point == "migration.applied":
        begin_without_tables(tmp_path)
    script = [sys.executable, "-m", "helpers.crashing_run", str(tmp_path), point]
    environment = {**os.environ, **of_child(tmp_path), "PYTHONPATH": str(ROOT / "tests")}
    child = await asyncio.create_subprocess_exec(*script, env=environment, cwd=ROOT)
    assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
    launcher = ScriptedLauncher(script=run_with_checkpoints)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job(spec=SPEC, request_id="r-1", fingerprint=b"same"))
        job = await core.until(job.uid, JobState.SUCCEEDED)
        log = await core.events(job.uid)
        told = await core.attempts(job.uid)
        assert len(await core.all_jobs()) == 1
        await core.collector.retention.sweep()
        left = await core.store.read(lambda conn: checkpoints.list_checkpoints(conn, job.uid))
    assert all(Path(each.path).exists() for each in left if each.state is CheckpointState.COMMITTED and each.step < 3)
    assert not any(each.state is CheckpointState.DELETING for each in left)
    assert_dense(log)
    assert states(log)[-1] == "SUCCEEDED" and states(log).count("SUCCEEDED") == 1
    assert [attempt.epoch for attempt in told] == list(range(1, job.epoch + 1))
    assert job.epoch <= 2
    # One model event for each attempt that came so far; none is published twice.
    assert sum(shown(event) == "model" for event in log) == 1


async def test_a_gang_that_outlives_its_coordinator_is_found_again_and_read_on(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.canary()
        gang.progress(1)
        await core.when(job.uid, lambda job: job.last_step == 1)
    gang.progress(2)
    async with running_core(tmp_path, launcher) as core:
        gang.progress(3)
        job = await core.when(job.uid, lambda job: job.last_step == 3)
        log = await core.events(job.uid)
    assert_dense(log)
    assert job.state is JobState.RUNNING and job.epoch == 1
    assert [event.progress.step for event in log if event.HasField("progress")] == [1, 2, 3]


async def test_a_gang_that_died_with_its_coordinator_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    first = ScriptedLauncher()
    spec = spec_pb2.JobSpec()
    spec.retry.max = 0  # That the service was stopped is not a failure of the job.
    async with running_core(tmp_path, first) as core:
        job = await core.submit(new_job(spec=spec))
        await core.when(job.uid, lambda _: bool(first.gangs))
        gang = first.newest()
        gang.canary()
        gang.checkpoint(2)
        await core.when(job.uid, lambda job: bool(job.latest_checkpoint))
    second = ScriptedLauncher(script=whole_run)
    second.name = "local"
    async with running_core(tmp_path, second) as core:
        job = await core.until(job.uid, JobState.SUCCEEDED)
        [lost, _] = await core.attempts(job.uid)
    assert job.epoch == 2
    assert job_pb2.FailureReport.FromString(lost.failure).reason == "DRAINED"
    assert len(second.newest().spec.resume_candidates) == 1


async def test_a_cancel_that_was_recorded_is_carried_out_by_the_next_start(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, stop_grace_s=60) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        launcher.newest().canary()
        await core.until(job.uid, JobState.RUNNING)
        launcher.unreachable = True
        await core.cancel(job)
    launcher.unreachable = False
    launcher.ignores_directives = False
    async with running_core(tmp_path, launcher) as core:
        job = await core.until(job.uid, JobState.CANCELLED)
    assert job.epoch == 1


async def test_a_failure_that_was_recorded_without_its_end_is_ended_after_the_next_start(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        launcher.newest().failure("USER_CONFIG")
        launcher.newest().progress(1)
        await core.when(job.uid, lambda job: job.last_step == 1)
    async with running_core(tmp_path, launcher, failure_grace_s=0.05) as core:
        job = await core.until(job.uid, JobState.FAILED)
    assert job_pb2.FailureReport.FromString(job.failure).reason == "USER_CONFIG"


async def test_a_second_coordinator_on_the_store_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    store = await open_store(store_at(tmp_path), SystemClock(), NullTrace())
    try:
        with pytest.raises((StoreLocked, StoreLed)) as refused:
            await open_store(store_at(tmp_path), SystemClock(), NullTrace())
    finally:
        await store.close()
    assert refused.value.exit_code == 75
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)


async def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    await _closed_store(tmp_path)
    change_by_hand(tmp_path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreTooNew):
        await open_store(store_at(tmp_path), SystemClock(), NullTrace())


async def test_a_hole_in_an_event_log_is_named(tmp_path: Path) -> None:
    async with running_core(tmp_path, ScriptedLauncher(script=whole_run)) as core:
        job = await core.submit(new_job())
        await core.until(job.uid, JobState.SUCCEEDED)
    change_by_hand(tmp_path, "DELETE FROM event WHERE sequence = 5")
    with pytest.raises(StoreBroken, match=job.uid):
        await open_store(store_at(tmp_path), SystemClock(), NullTrace())


async def _closed_store(folder: Path) -> None:
    store = await open_store(store_at(folder), SystemClock(), NullTrace())
    await store.close()
