"""What is kept on the storage, and what goes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from helpers.core import ACTOR, assert_dense, new_job, running_core, shown
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.records import CheckpointState
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import checkpoints, jobs


def checkpoint(gang: ScriptedGang, step: int, value: float, metric: str = "loss") -> Path:
    folder = Path(gang.launch.attempt_dir) / f"step-{step:09}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "shard.bin").write_bytes(b"x")
    gang.checkpoint(step, **{metric: value})
    return folder


@pytest.mark.parametrize(
    ("metric", "values"),
    [("", [0.9, 0.1, 0.5, 0.6]), ("loss", [0.9, 0.1, 0.5, 0.6]), ("accuracy", [0.2, 0.9, 0.9, 0.6])],
)
async def test_the_newest_and_the_best_stay_and_the_others_go_with_an_event(
    tmp_path: Path, metric: str, values: list[float]
) -> None:
    spec = spec_pb2.JobSpec()
    spec.checkpoints.keep_last = 1
    spec.evaluation.metric = metric
    plan = plan_pb2.JobPlan(metrics=[plan_pb2.EvaluationMetric(name="accuracy", higher_is_better=True)])
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job(spec=spec, plan=plan.SerializeToString()))
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        folders = [checkpoint(gang, step, value, metric or "loss") for step, value in enumerate(values, start=1)]

        async def kept() -> list[int]:
            held = await core.store.read(lambda conn: checkpoints.list_checkpoints(conn, job.uid))
            return [each.step for each in held if each.state is not CheckpointState.DELETED]

        await core.when(job.uid, lambda job: job.latest_checkpoint.endswith("s4"))
        while await kept() != [4, 2]:
            await core.when(job.uid, lambda job, seen=job.last_sequence: job.last_sequence > seen)
        log = await core.events(job.uid)
        job = await core.job(job.uid)
    assert_dense(log)
    assert [folder.exists() for folder in folders] == [False, True, False, True]
    assert job.best_checkpoint.endswith("e1-s2")
    assert [shown(event) for event in log].count("checkpoint") == 6


async def test_what_cannot_be_removed_keeps_nothing_else_from_going(tmp_path: Path) -> None:
    spec = spec_pb2.JobSpec()
    spec.checkpoints.keep_last = 1
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job(spec=spec))
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        in_the_way = Path(gang.launch.attempt_dir) / "step-000000001"
        in_the_way.parent.mkdir(parents=True)
        in_the_way.write_text("not a folder")
        gang.checkpoint(1, loss=0.9)
        folders = [checkpoint(gang, step, loss) for step, loss in [(2, 0.5), (3, 0.1)]]
        await core.when(job.uid, lambda job: job.latest_checkpoint.endswith("s3"))
        await core.collector.retention.thin(job.uid)
        await core.collector.retention.sweep()
        held = await core.store.read(lambda conn: checkpoints.list_checkpoints(conn, job.uid))
    assert [folder.exists() for folder in folders] == [False, True]
    states = {each.step: each.state for each in held}
    assert (states[1], states[2]) == (CheckpointState.DELETING, CheckpointState.DELETED)


async def test_a_deleted_job_leaves_no_checkpoint_and_its_logs_for_a_day(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        folder = checkpoint(gang, 1, 0.5)
        log = Path(gang.launch.attempt_dir) / "logs" / "rank-0.stdout.log"
        log.parent.mkdir()
        log.write_text("hello\n")
        gang.failure("USER_CONFIG")
        gang.ended(ok=False)
        await core.until(job.uid, JobState.FAILED)
        now_us = core.clock.now_us()
        await core.store.write(
            lambda conn: jobs.delete_job(conn, "default", "job", "", actor=ACTOR, now_us=now_us - 10), ACTOR
        )
        await core.collector.retention.sweep()
        assert (folder.exists(), log.exists()) == (False, True)
        later = now_us - 2 * 86_400_000_000
        await core.store.write(lambda conn: _age(conn, job.uid, later), ACTOR)
        await core.collector.retention.sweep()
        assert not log.exists()
        assert await core.events(job.uid) == []
        assert (await core.job(job.uid)).deleted_us == later


async def test_a_sweep_removes_old_folders_that_have_no_row_and_nothing_else(tmp_path: Path) -> None:
    models = tmp_path / "storage" / "models"
    names = {"a" * 32: 0.0, "b" * 32: None, "not-a-uid": 0.0}
    async with running_core(tmp_path, ScriptedLauncher()) as core:
        (models / ("0" * 32)).write_text("a file, which cannot be removed as a folder")
        os.utime(models / ("0" * 32), (0, 0))
        for name, age in names.items():
            (models / name).mkdir()
            if age is not None:
                os.utime(models / name, (age, age))
        await core.collector.retention.sweep()
    assert sorted(path.name for path in models.iterdir()) == ["0" * 32, "b" * 32, "not-a-uid"]


async def test_what_could_not_go_while_the_storage_was_away_goes_when_it_is_back(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        folder = checkpoint(gang, 1, 0.5)
        gang.failure("USER_CONFIG")
        gang.ended(ok=False)
        await core.until(job.uid, JobState.FAILED)
        claim = tmp_path / "storage" / "store-id"
        claim.rename(tmp_path / "away")
        now_us = core.clock.now_us()
        await core.store.write(
            lambda conn: jobs.delete_job(conn, "default", "job", "", actor=ACTOR, now_us=now_us), ACTOR
        )
        await asyncio.sleep(0.1)
        assert folder.exists()
        (tmp_path / "away").rename(claim)
        async with asyncio.timeout(10):
            while folder.exists():
                await asyncio.sleep(0.01)


async def test_a_sweep_removes_old_folders_of_unknown_jobs(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        folder = tmp_path / "storage" / "jobs"
        for name, is_old in ((job.uid, True), ("a" * 32, True), ("b" * 32, False), ("notes", True)):
            (folder / name).mkdir(exist_ok=True)
            if is_old:
                os.utime(folder / name, (0, 0))
        await core.collector.retention.sweep()
        assert sorted(path.name for path in folder.iterdir()) == sorted([job.uid, "b" * 32, "notes"])


async def test_what_a_killed_attempt_left_half_made_is_removed_and_whole_checkpoints_stay(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        whole = checkpoint(gang, 1, 0.5)
        await core.when(job.uid, lambda job: job.latest_checkpoint.endswith("s1"))
        attempt_dir = Path(gang.launch.attempt_dir)
        spec = worker_pb2.AttemptSpec.FromString(gang.launch.spec)
        export = Path(spec.export_dir)
        half = [
            attempt_dir / "step-000000002",
            attempt_dir / "export-dry-run-x",
            export.with_name(f".{export.name}.e1"),
        ]
        for folder in half:
            folder.mkdir(parents=True)
            (folder / "shard.pt").write_bytes(b"half")
        gang.failure("USER_CONFIG")
        gang.ended(ok=False)
        await core.until(job.uid, JobState.FAILED)
        async with asyncio.timeout(10):
            while any(folder.exists() for folder in half):
                await asyncio.sleep(0.01)
    assert whole.exists()


def _age(conn: object, uid: str, deleted_us: int) -> None:
    jobs.change_job(conn, uid, deleted_us, {"deleted_us": deleted_us})  # type: ignore[arg-type]
