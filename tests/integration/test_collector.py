"""Jobs through store, loop and collector, over gangs that are scripts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection

from helpers.core import ACTOR, TERMINAL, add_model, assert_dense, new_job, running_core, shown, states
from helpers.manifests import write_manifest
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher, whole_run
from shardyard.v1 import job_pb2, model_service_pb2, spec_pb2, transfer_pb2
from shardyard_coordinator.domain.records import CheckpointState, ResourceKind
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.store import checkpoints, jobs, metrics, resources


async def test_a_job_goes_from_queued_to_a_registered_model(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(script=whole_run)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job(workers=2))
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
        [attempt] = await core.attempts(job.uid)
    assert_dense(log)
    assert [shown(event) for event in log] == [
        "QUEUED",
        "PREPARING",
        "attempt STARTING",
        "attempt ACTIVE",
        "phase",
        "progress",
        "canary",
        "RUNNING",
        "progress",
        "progress",
        "progress",
        "evaluation",
        "checkpoint",
        "FINALIZING",
        "evaluation",
        "model",
        "attempt ENDED",
        "SUCCEEDED",
    ]
    assert (job.model, job.latest_checkpoint) == ("projects/default/models/job", f"{job.name}/checkpoints/e1-s4")
    assert job.best_checkpoint == job.latest_checkpoint
    assert job.start_us and job.end_us and job.slot_seconds > 0
    assert (attempt.state, attempt.placement, attempt.nodes) == (
        AttemptState.ENDED,
        (("node-1", 2),),
        ("node-1", "node-1"),
    )


async def test_every_answer_twice_is_recorded_once(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    launcher.duplicate = True
    async with running_core(tmp_path, launcher, poll_s=0.02) as core:
        job = await core.submit(new_job())
        await core.until(job.uid, JobState.PREPARING)
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.resumed()
        for step in range(1, 30):
            gang.metrics(step, step)
            gang.progress(step)
            if step == 2:
                gang.canary()
            await core.when(job.uid, lambda job, step=step: job.last_step == step)
        log = await core.events(job.uid)
        [series] = await core.store.read(lambda conn: metrics.query_metrics(conn, job.uid, []))
    assert_dense(log)
    assert [event.progress.step for event in log if event.HasField("progress")] == list(range(1, 30))
    assert [point.step for point in series.points] == list(range(1, 30))


async def test_a_lost_worker_is_replaced_and_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        if gang.launch.key.epoch > 1:
            whole_run(gang, steps=8)
            return
        gang.resumed()
        gang.progress(1)
        gang.canary()
        gang.checkpoint(3)
        gang.progress(5)
        gang.failure("WORKER_LOST", rank=1, step=5)
        gang.ended(ok=False)

    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
        first, second = await core.attempts(job.uid)
    assert_dense(log)
    assert job.state is JobState.SUCCEEDED
    assert states(log)[:6] == ["QUEUED", "PREPARING", "RUNNING", "RECOVERING", "QUEUED", "PREPARING"]
    lost = job_pb2.FailureReport.FromString(first.failure)
    assert (lost.reason, lost.rank, lost.step, lost.attempt) == ("WORKER_LOST", 1, 5, 1)
    assert lost.next_step
    [resumed_from] = launcher.newest().spec.resume_candidates
    assert resumed_from == str(tmp_path / f"storage/jobs/{job.uid}/e000001/step-000000003")
    assert (second.resumed_from_step, job.recomputed_steps) == (3, 2)
    assert job.failure == b""


async def test_a_dead_supervisor_is_a_lost_worker_and_is_confirmed_gone_first(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.canary()
        await core.until(job.uid, JobState.RUNNING)
        launcher.script = whole_run
        gang.die()
        job = await core.until(job.uid, *TERMINAL)
        [first, _] = await core.attempts(job.uid)
    assert job.state is JobState.SUCCEEDED
    assert job_pb2.FailureReport.FromString(first.failure).reason == "WORKER_LOST"
    assert gang.launch.key in launcher.killed


async def test_a_cluster_that_comes_back_as_another_has_lost_its_gangs(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        launcher.script = whole_run
        launcher.lose_cluster()
        job = await core.until(job.uid, *TERMINAL)
        [first, _] = await core.attempts(job.uid)
    assert job_pb2.FailureReport.FromString(first.failure).reason == "RAY_LOST"


async def test_silence_is_a_condition_and_nothing_else(tmp_path: Path) -> None:
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, poll_s=0.02) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.canary()
        await core.until(job.uid, JobState.RUNNING)
        launcher.unreachable = True
        held = await core.when(job.uid, lambda job: bool(job.conditions))
        assert held.state is JobState.RUNNING
        launcher.unreachable = False
        await core.when(job.uid, lambda job: not job_pb2.Job.FromString(job.conditions).conditions)
        gang.progress(2)
        await core.when(job.uid, lambda job: job.last_step == 2)
        log = await core.events(job.uid)
    assert [event.condition.active for event in log if event.HasField("condition")] == [True, False]
    assert len(launcher.gangs) == 1


async def test_a_corrupt_checkpoint_is_reported_and_no_longer_a_resume_point(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        if gang.launch.key.epoch == 1:
            gang.resumed()
            gang.canary()
            gang.checkpoint(2, loss=0.5)
            gang.checkpoint(4, loss=0.4)
            gang.failure("WORKER_LOST")
            gang.ended(ok=False)
            return
        gang.emit(
            checkpoint={
                "change": job_pb2.CheckpointChanged.CHANGE_CORRUPT,
                "epoch": 1,
                "step": 4,
                "message": "model.bin: xxh3",
            }
        )
        gang.resumed(2)

    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.when(job.uid, lambda job: job.epoch == 2 and job.last_step == 2)
        log = await core.events(job.uid)
        held = await core.store.read(lambda conn: checkpoints.list_checkpoints(conn, job.uid))
    assert [each.state for each in held] == [CheckpointState.CORRUPT, CheckpointState.COMMITTED]
    told = [event.checkpoint for event in log if event.HasField("checkpoint")]
    assert told[-1].message == "model.bin: xxh3"
    assert job.latest_checkpoint == job.best_checkpoint == f"{job.name}/checkpoints/e1-s2"


async def test_data_that_is_gone_before_the_launch_pauses_the_job(tmp_path: Path) -> None:
    spec = spec_pb2.JobSpec(train_data=spec_pb2.DataSource(dataset="projects/default/datasets/gone"))
    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job(spec=spec))
        job = await core.until(job.uid, JobState.PAUSED)
        [attempt] = await core.attempts(job.uid)
    report = job_pb2.FailureReport.FromString(job.failure)
    assert (job.state, report.reason) == (JobState.PAUSED, "DATA_NOT_FOUND")
    assert "projects/default/datasets/gone" in report.message
    assert attempt.state is AttemptState.ENDED and not launcher.gangs


async def test_a_checkpoint_whose_report_was_lost_is_a_resume_point_all_the_same(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        if gang.launch.key.epoch == 1:
            write_manifest(Path(gang.spec.job_dir), gang.spec.job_uid, epoch=1, step=6)
            gang.failure("WORKER_LOST", step=7)
            gang.ended(ok=False)
            return
        whole_run(gang, steps=8)

    launcher = ScriptedLauncher(script=script)
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        job = await core.until(job.uid, *TERMINAL)
        log = await core.events(job.uid)
    assert [path[-14:] for path in launcher.newest().spec.resume_candidates] == ["step-000000006"]
    assert [event.checkpoint.step for event in log if event.HasField("checkpoint")] == [6, 8]


async def test_a_result_is_described_and_its_name_gives_way_to_one_that_is_taken(tmp_path: Path) -> None:
    model = model_service_pb2.Model(
        model_type="bert",
        task="text_classification",
        labels=["no", "yes"],
        num_parameters=5,
        files=[transfer_pb2.StoredFile(path="config.json", size_bytes=2, sha256="0" * 64)],
    )

    def script(gang: ScriptedGang) -> None:
        gang.canary()
        gang.finished(1)
        gang.exported(model)
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script)) as core:
        first = await core.until((await core.submit(new_job())).uid, *TERMINAL)
        assert (first.state, first.model) == (JobState.SUCCEEDED, "projects/default/models/job")
        await core.store.write(_delete, ACTOR)
        second = await core.until((await core.submit(new_job())).uid, *TERMINAL)
        names = await core.store.read(lambda conn: resources.list_resources(conn, ResourceKind.MODEL, "default"))
    assert second.model == f"projects/default/models/job-{second.uid[-8:]}"
    assert [each.name for each in names] == [second.model, first.model]


async def test_a_result_is_registered_whatever_names_are_taken(tmp_path: Path) -> None:
    def script(gang: ScriptedGang) -> None:
        gang.canary()
        gang.finished(1)
        gang.exported(model_service_pb2.Model(model_type="bert", task="causal_lm"))
        gang.ended(ok=False)

    async with running_core(tmp_path, ScriptedLauncher(script=script), schedule=False) as core:
        job = await core.submit(new_job())
        for taken in ("job", f"job-{job.uid[-8:]}"):
            await core.store.write(partial(add_model, resource_id=taken), ACTOR)
        await core.loop.step()
        ended = await core.until(job.uid, *TERMINAL)
    assert (ended.state, ended.model) == (JobState.SUCCEEDED, f"projects/default/models/job-{job.uid}")


def _delete(conn: Connection) -> None:
    jobs.delete_job(conn, "default", "job", "", actor=ACTOR, now_us=1)


async def test_what_a_condition_says_is_renewed_in_the_job_without_another_event(tmp_path: Path) -> None:
    def pressure(seconds: int, message: str, *, active: bool = True) -> job_pb2.Condition:
        kind = job_pb2.Condition.TYPE_DISK_PRESSURE
        return job_pb2.Condition(type=kind, active=active, message=message, time=Timestamp(seconds=seconds))

    launcher = ScriptedLauncher()
    async with running_core(tmp_path, launcher, poll_s=0.02) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.canary()
        gang.emit(condition=pressure(100, "a checkpoint was skipped"))
        await core.when(job.uid, lambda job: bool(job.conditions))
        gang.emit(condition=pressure(200, "reports wait"))
        renewed = await core.when(job.uid, lambda job: b"reports wait" in (job.conditions or b""))
        [held] = job_pb2.Job.FromString(renewed.conditions).conditions
        assert held.time.seconds == 100  # Since when it holds.
        gang.emit(condition=pressure(300, "", active=False))
        await core.when(job.uid, lambda job: not job_pb2.Job.FromString(job.conditions).conditions)
        log = await core.events(job.uid)
    told = [(event.condition.active, event.condition.message) for event in log if event.HasField("condition")]
    assert told == [(True, "a checkpoint was skipped"), (False, "")]
