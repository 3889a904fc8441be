"""What gangs report is brought into bounds on its way in, and rows on their way out: one odd value hides no other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection, literal_column

from helpers.core import ACTOR, Core, assert_dense, new_job, running_core
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher
from helpers.service import PARENT, Service, serving_store
from shardyard.v1 import job_pb2, job_service_pb2, metric_service_pb2, model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import bounds, tables

NAME = f"{PARENT}/jobs/job"
FAR = Timestamp(seconds=1 << 62, nanos=-5)
AGES = Duration(seconds=190_000_000_000_000)
TEN_YEARS_S = bounds.MAX_DURATION_S
NAN, INF = math.nan, math.inf


@contextlib.asynccontextmanager
async def running(folder: Path, launcher: ScriptedLauncher) -> AsyncIterator[tuple[Core, Service]]:
    async with (
        running_core(folder, launcher) as core,
        serving_store(core.store, folder, clock=core.clock, launcher=launcher) as service,
    ):
        yield core, service


def times_of(message: Message) -> Iterator[Message]:
    """Every Timestamp and Duration at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in value if field.is_repeated and not field.message_type.GetOptions().map_entry else [value]:
            if isinstance(each, (Timestamp, Duration)):
                yield each
            elif isinstance(each, Message):
                yield from times_of(each)


def assert_readable(message: Message) -> None:
    """Every client can read it: as JSON, and its times and durations as Python's own."""
    json_format.MessageToJson(message)
    for each in times_of(message):
        if isinstance(each, Timestamp):
            assert each.ToDatetime().year <= 9999
        else:
            assert 0 <= each.ToTimedelta().total_seconds() <= TEN_YEARS_S


def extreme(gang: ScriptedGang) -> None:
    """One of each kind of report, with values that no client could read."""
    gang.emit(phase=job_pb2.PhaseStarted(phase="a\0b" * 9000, message="x" * 500_000))
    gang.ready()
    gang.resumed(-5)
    gang.canary()
    progress = job_pb2.Progress(step=(1 << 63) - 1, total_steps=-1, data_epoch=NAN, loss=NAN, eta=AGES)
    progress.tokens_per_s, progress.grad_norm, progress.learning_rate = INF, INF, -INF
    gang.emit(progress=progress)
    points = [metric_service_pb2.MetricPoint(step=-(1 << 63), time=FAR, value=NAN)]
    points.append(metric_service_pb2.MetricPoint(step=(1 << 63) - 1, time=Timestamp(nanos=-1), value=INF))
    gang.emit(metrics=worker_pb2.Metrics(series=[metric_service_pb2.MetricSeries(metric="m" * 9000, points=points)]))
    evaluation = job_pb2.Evaluation(step=-1, metrics={"loss": NAN, "x" * 9000: 1.0}, num_samples=-7)
    evaluation.metrics.update({f"m{at}": float(at) for at in range(2000)})
    gang.emit(evaluation=evaluation)
    gang.emit(warning=job_pb2.Warning(reason="R" * 9000, message="\0" * 40_000, field="\0"))
    gang.emit(condition=job_pb2.Condition(type=99, active=True, message="m" * 99_999, time=FAR))  # type: ignore[arg-type]
    gang.emit(canary=job_pb2.CanaryPassed(duration_s=INF))
    report = worker_pb2.CheckpointReport(change=job_pb2.CheckpointChanged.CHANGE_COMMITTED, path="/p\0", epoch=1)
    report.step, report.size_bytes, report.metrics["loss"] = (1 << 63) - 1, -1, NAN
    gang.emit(checkpoint=report)
    gang.events[-1].time.CopyFrom(FAR)


async def test_a_job_whose_trainer_reports_extreme_values_is_listed_got_watched_and_measured(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(script=extreme)
    async with running(tmp_path, launcher) as (core, service):
        job = await core.submit(new_job())
        await core.submit(new_job("other", workers=9))
        await core.when(job.uid, lambda job: bool(job.latest_checkpoint))
        got = await service.jobs.GetJob(job_service_pb2.GetJobRequest(name=NAME))
        listed = (await service.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=PARENT))).jobs
        full = job_service_pb2.ListJobsRequest(parent=PARENT, view=job_service_pb2.JOB_VIEW_FULL)
        assert len((await service.jobs.ListJobs(full)).jobs) == len(listed) == 2
        tried = (await service.jobs.ListAttempts(job_service_pb2.ListAttemptsRequest(parent=NAME))).attempts
        answer = await service.metrics.QueryMetrics(metric_service_pb2.QueryMetricsRequest(name=NAME))
        watched: list[job_pb2.JobEvent] = []
        async for batch in service.jobs.WatchJob(job_service_pb2.WatchJobRequest(name=NAME, include_snapshot=True)):
            assert_readable(batch)
            watched += batch.events
            if watched and watched[-1].sequence >= got.last_event_sequence:
                break
    assert_dense(watched)
    for message in (got, *listed, *tried, answer, *watched):
        assert_readable(message)
        assert "\0" not in json_format.MessageToJson(message)
    assert not got.progress.HasField("eta") and got.progress.step == bounds.MAX_COUNT
    assert math.isnan(got.progress.loss) and got.progress.tokens_per_s == got.progress.data_epoch == 0
    assert got.progress.total_steps == 0 and math.isnan(got.evaluation.metrics["loss"])
    assert len(got.evaluation.metrics) <= bounds.MAX_ENTRIES
    assert len(answer.SerializeToString()) < 200_000
    [phase] = [event.phase for event in watched if event.HasField("phase")]
    assert len(phase.message) == 16_384 and phase.phase.startswith("a\ufffdb")


async def test_an_unreadable_event_is_skipped_and_reported(tmp_path: Path) -> None:
    class Broken(ScriptedLauncher):
        async def events_after(self, *args: object, **keywords: object) -> list[bytes]:
            found = await super().events_after(*args, **keywords)  # type: ignore[arg-type]
            return [b"\xff\xff\xff" if b"spoilt" in each else each for each in found]

    def script(gang: ScriptedGang) -> None:
        gang.canary()
        gang.emit(phase=job_pb2.PhaseStarted(phase="spoilt"))
        gang.progress(3)

    async with running_core(tmp_path, Broken(script=script)) as core:
        job = await core.submit(new_job())
        job = await core.when(job.uid, lambda job: job.last_step == 3)
        log = await core.events(job.uid)
    assert_dense(log)
    [warning] = [event.warning for event in log if event.HasField("warning")]
    assert warning.reason == "EVENT_UNREADABLE" and "event 2 of the gang" in warning.message


NOT_TEXT = literal_column("CAST(x'e28028ff' AS TEXT)")
ROWS = [
    {"progress": job_pb2.Progress(step=3, total_steps=1 << 53, eta=AGES).SerializeToString()},
    {"progress": b"\xff\xff", "evaluation": b"\xff", "failure": b"\xff", "conditions": b"\xff", "pending": b"\xff"},
    {"description": b"\xff", "spec": b"\xff", "resolved_spec": b"\xff"},
    {"create_us": (1 << 63) - 1, "start_us": -(1 << 63), "end_us": 1 << 62, "update_us": 1 << 60},
    {"priority": 1 << 40, "epoch": 1 << 40, "recomputed_steps": -1, "slot_seconds": INF},
    {"pending": job_pb2.PendingInfo(position=1, until=FAR).SerializeToString()},
    {"conditions": job_pb2.Job(conditions=[job_pb2.Condition(active=True, time=FAR)]).SerializeToString()},
    {"display_name": NOT_TEXT, "queue": NOT_TEXT, "latest_checkpoint": NOT_TEXT, "creator": NOT_TEXT},
    {"failure": job_pb2.FailureReport(step=-3, log_tail="x\0" * 99_999).SerializeToString()},
]


@pytest.mark.parametrize("row", ROWS, ids=[", ".join(row) for row in ROWS])
async def test_an_odd_row_of_an_earlier_version_hides_no_other(tmp_path: Path, row: dict[str, object]) -> None:
    launcher = ScriptedLauncher(nodes=())
    async with running(tmp_path, launcher) as (core, service):
        odd = await core.submit(new_job())
        await core.submit(new_job("other"))

        def spoil(conn: Connection) -> None:
            changed = {**row, "state": JobState.CANCELLED.value if "end_us" in row else JobState.QUEUED.value}
            conn.execute(tables.job.update().where(tables.job.c.uid == odd.uid).values(**changed))

        await core.store.write(spoil, ACTOR)
        for view in (job_service_pb2.JOB_VIEW_BASIC, job_service_pb2.JOB_VIEW_FULL):
            listed = await service.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=PARENT, view=view))
            assert {job.name for job in listed.jobs} == {NAME, f"{PARENT}/jobs/other"}
            assert_readable(listed)
        assert_readable(await service.jobs.GetJob(job_service_pb2.GetJobRequest(name=NAME)))


def test_every_kind_of_report_with_any_extreme_value_is_brought_into_bounds() -> None:
    kinds = [field.message_type for field in worker_pb2.WorkerEvent.DESCRIPTOR.oneofs_by_name["payload"].fields]
    assert job_pb2.Progress.DESCRIPTOR in kinds
    for value in ((1 << 63) - 1, -(1 << 63)):
        for real in (NAN, INF, -INF, 1e308):
            event = worker_pb2.WorkerEvent()
            for field in worker_pb2.WorkerEvent.DESCRIPTOR.oneofs_by_name["payload"].fields:
                payload = getattr(event, field.name)
                fill(payload, value, real, depth=4)
                bounds.bound(payload)
                assert_readable(payload)


def fill(message: Message, value: int, real: float, depth: int) -> None:
    """Every field has an extreme value of its type."""
    message.SetInParent()
    if isinstance(message, (Timestamp, Duration)):
        message.seconds, message.nanos = value, -7
        return
    for field in message.DESCRIPTOR.fields:
        held = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            if depth:
                fill(held.add() if field.is_repeated else held, value, real, depth - 1)
        elif field.is_repeated:
            continue
        elif field.type == FieldDescriptor.TYPE_INT64:
            setattr(message, field.name, value)
        elif field.type == FieldDescriptor.TYPE_DOUBLE:
            setattr(message, field.name, real)
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, "\0" * 100_000)


def test_values_within_bounds_stay_as_they_are() -> None:
    model = model_service_pb2.Model(labels=["no", "yes"], num_parameters=5, metrics={"loss": 0.25})
    before = model.SerializeToString(deterministic=True)
    bounds.bound(model)
    assert model.SerializeToString(deterministic=True) == before
    progress = job_pb2.Progress(step=1 << 53, loss=INF, eta=Duration(seconds=TEN_YEARS_S), learning_rate=1e-300)
    before = progress.SerializeToString()
    bounds.bound(progress)
    assert progress.SerializeToString() == before
