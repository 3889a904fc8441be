"""Turns a batch of a gang's events into rows and events of its job, in one transaction (docs/worker-protocol.md).

The attempt's high-water mark moves in the same transaction, so an event delivered twice is recorded once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sqlalchemy import Connection

from shardyard.v1 import job_pb2, metric_service_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.outputs import register
from shardyard_coordinator.control.storage import hide_root
from shardyard_coordinator.domain.records import (
    AttemptRecord,
    CheckpointRecord,
    CheckpointState,
    EventDraft,
    EventKind,
    JobRecord,
    MetricPoint,
)
from shardyard_coordinator.domain.states import AttemptState, JobState, may_move
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.seams import Trace
from shardyard_coordinator.store import attempts, bounds, checkpoints, encode, events, jobs, metrics

# A metric's name is in an index, where PostgreSQL takes 2,704 bytes at most.
_MAX_METRIC = 256


class SpoolGap(Exception):
    """A gang's events are not dense: a defect of its supervisor."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Job and attempt after a batch; `ended` is set once the gang has ended."""

    job: JobRecord
    attempt: AttemptRecord
    ended: worker_pb2.GangEnded | None = None
    committed: bool = False


def record_events(
    conn: Connection,
    job_uid: str,
    epoch: int,
    batch: Sequence[worker_pb2.WorkerEvent],
    *,
    trace: Trace,
    now_us: int,
) -> Recorded:
    """Records what is new in the batch. Raises: StaleWrite (the attempt is over, or the job gone), SpoolGap."""
    job = jobs.get_job_by_uid(conn, job_uid)
    attempt = attempts.get_attempt(conn, job_uid, epoch)
    if job is None or attempt is None or job.deleted_us or job.epoch != epoch or attempt.state is AttemptState.ENDED:
        raise StaleWrite(f"attempt {epoch} of job {job_uid} is over")
    fresh = [event for event in batch if event.sequence > attempt.high_water]
    expected = range(attempt.high_water + 1, attempt.high_water + 1 + len(fresh))
    if [event.sequence for event in fresh] != list(expected):
        got = [event.sequence for event in fresh[:5]]
        raise SpoolGap(f"attempt {epoch} of job {job_uid}: expected {expected.start} and on, got {got}")
    if not fresh:
        return Recorded(job, attempt)
    attempt = attempts.take_events(conn, attempt, fresh[-1].sequence)
    recording = _Recording(conn, job, attempt, trace, now_us)
    for event in fresh:
        recording.take(event)
    return recording.finish()


def read_events(batch: Sequence[bytes], after: int, *, storage: Path) -> list[worker_pb2.WorkerEvent]:
    """A batch that follows the event `after`, without the storage root; a warning replaces an unreadable event."""
    found: list[worker_pb2.WorkerEvent] = []
    for data in batch:
        try:
            event = worker_pb2.WorkerEvent.FromString(data)
            if event.HasField("failure"):
                hide_root(event.failure, storage)
            found.append(event)
        except DecodeError:
            sequence = found[-1].sequence + 1 if found else after + 1
            text = f"event {sequence} of the gang cannot be read ({len(data)} bytes), and was skipped"
            found.append(worker_pb2.WorkerEvent(sequence=sequence, warning=_unreadable(text)))
    return found


def _unreadable(message: str) -> job_pb2.Warning:
    return job_pb2.Warning(reason="EVENT_UNREADABLE", message=message)


class _Recording:
    """One batch: appends and changes are collected, and written together before each change of the job's state."""

    def __init__(self, conn: Connection, job: JobRecord, attempt: AttemptRecord, trace: Trace, now_us: int) -> None:
        self._conn = conn
        self._job = job
        self._attempt = attempt
        self._trace = trace
        self._now_us = now_us
        self._drafts: list[EventDraft] = []
        self._changes: dict[str, Any] = {}
        self._attempt_changes: dict[str, Any] = {}
        self._points: dict[str, list[MetricPoint]] = {}
        self._ended: worker_pb2.GangEnded | None = None
        self._committed = False
        self._time_us = now_us

    def take(self, event: worker_pb2.WorkerEvent) -> None:
        kind = event.WhichOneof("payload")
        if self._attempt.state is AttemptState.STARTING:
            self._confirm()
        self._time_us = bounds.time_us(event.time) or self._now_us
        if kind is None:
            return
        payload = getattr(event, kind)
        if kind != "metrics":  # There are many of them: each is checked when it becomes a point.
            bounds.bound(payload)
        getattr(self, f"_on_{kind}")(payload)

    def finish(self) -> Recorded:
        self._flush()
        return Recorded(self._job, self._attempt, self._ended, self._committed)

    def _on_ready(self, ready: worker_pb2.GangReady) -> None:
        del ready  # The nodes are those of the placement.

    def _on_phase(self, phase: job_pb2.PhaseStarted) -> None:
        self._append(EventKind.PHASE, job_pb2.JobEvent(phase=phase))

    def _on_progress(self, progress: job_pb2.Progress) -> None:
        self._append(EventKind.PROGRESS, job_pb2.JobEvent(progress=progress))
        self._changes["progress"] = progress.SerializeToString()
        self._changes["last_step"] = progress.step
        self._attempt_changes["last_step"] = progress.step
        if progress.step >= 1 and not self._job.start_us:
            self._changes.setdefault("start_us", self._now_us)

    def _on_metrics(self, metrics: worker_pb2.Metrics) -> None:
        for series in metrics.series:
            points = self._points.setdefault(bounds.text(series.metric, _MAX_METRIC), [])
            points.extend(self._point(point) for point in series.points)

    def _point(self, point: metric_service_pb2.MetricPoint) -> MetricPoint:
        return MetricPoint(self._attempt.epoch, bounds.count(point.step), bounds.time_us(point.time), point.value)

    def _on_resumed(self, resumed: worker_pb2.Resumed) -> None:
        self._flush()
        again = max(self._job.last_step - resumed.step, 0)
        self._changes["recomputed_steps"] = self._job.recomputed_steps + again
        self._changes["last_step"] = resumed.step
        self._attempt_changes.update(resumed_from_step=resumed.step, last_step=resumed.step)
        self._flush()
        if resumed.step:
            attempts.append_attempt_event(self._conn, self._job, self._attempt, self._now_us)
            self._reload()

    def _on_checkpoint(self, report: worker_pb2.CheckpointReport) -> None:
        self._flush()
        epoch = report.epoch or self._attempt.epoch
        if report.change == job_pb2.CheckpointChanged.CHANGE_COMMITTED:
            if epoch == self._attempt.epoch:  # An attempt commits only its own checkpoints.
                self._commit_checkpoint(report)
        else:
            self._lose_checkpoint(report, epoch)
        self._reload()

    def _commit_checkpoint(self, report: worker_pb2.CheckpointReport) -> None:
        metrics_of = job_pb2.Evaluation(step=report.step, metrics=report.metrics) if report.metrics else None
        record = CheckpointRecord(
            job_uid=self._job.uid,
            epoch=self._attempt.epoch,
            step=report.step,
            state=CheckpointState.COMMITTED,
            path=report.path,
            size_bytes=report.size_bytes,
            workers=report.world_size,
            metrics=metrics_of.SerializeToString() if metrics_of else b"",
            create_us=self._now_us,
        )
        if record_checkpoint(self._conn, self._job, record, self._now_us):
            self._attempt_changes["committed"] = self._attempt.committed + 1
            self._committed = True
            self._trace.point("checkpoint.recorded")

    def _lose_checkpoint(self, report: worker_pb2.CheckpointReport, epoch: int) -> None:
        record = checkpoints.get_checkpoint(self._conn, self._job.uid, epoch, report.step)
        corrupt = report.change == job_pb2.CheckpointChanged.CHANGE_CORRUPT
        state = CheckpointState.CORRUPT if corrupt else CheckpointState.DELETED
        if record is None or not checkpoints.set_checkpoint_state(self._conn, record, state):
            return
        append_checkpoint_event(self._conn, self._job, record, report.change, self._now_us, message=report.message)
        forget_checkpoint(self._conn, self._job, record, self._now_us)

    def _on_evaluation(self, evaluation: job_pb2.Evaluation) -> None:
        self._append(EventKind.EVALUATION, job_pb2.JobEvent(evaluation=evaluation))
        if evaluation.is_partial:
            return
        for name, value in evaluation.metrics.items():
            if math.isfinite(value):
                point = MetricPoint(self._attempt.epoch, evaluation.step, self._time_us, value)
                self._points.setdefault(f"eval/{name}", []).append(point)
        self._changes["evaluation"] = evaluation.SerializeToString()

    def _on_warning(self, warning: job_pb2.Warning) -> None:
        self._append(EventKind.WARNING, job_pb2.JobEvent(warning=warning))

    def _on_condition(self, condition: job_pb2.Condition) -> None:
        held = self._changes.get("conditions", self._job.conditions)
        since = [each.time for each in job_pb2.Job.FromString(held or b"").conditions if each.type == condition.type]
        if condition.active != bool(since):
            self._append(EventKind.CONDITION, job_pb2.JobEvent(condition=condition))  # It begins once, and ends once.
        elif since:
            condition.time.CopyFrom(since[0])  # A new message for a condition that has held since then.
        self._changes["conditions"] = with_condition(held, condition)

    def _on_canary(self, canary: job_pb2.CanaryPassed) -> None:
        self._append(EventKind.CANARY, job_pb2.JobEvent(canary=canary))
        self._advance(JobState.RUNNING)

    def _on_finished(self, finished: worker_pb2.TrainingFinished) -> None:
        if self._job.state is JobState.PREPARING:
            self._advance(JobState.RUNNING)
        self._changes["last_step"] = finished.step
        self._advance(JobState.FINALIZING)

    def _on_exported(self, exported: worker_pb2.Exported) -> None:
        self._flush()
        if not self._attempt.exported:
            register(self._conn, self._job, self._attempt, exported, self._now_us)
            self._attempt_changes["exported"] = 1
            self._trace.point("model.recorded")
        self._reload()

    def _on_failure(self, failure: job_pb2.FailureReport) -> None:
        if self._attempt.failure or self._attempt_changes.get("failure"):
            return  # The first failure is the cause.
        report = job_pb2.FailureReport()
        report.CopyFrom(failure)
        report.attempt = self._attempt.epoch
        self._attempt_changes["failure"] = report.SerializeToString()

    def _on_stopped(self, stopped: worker_pb2.Stopped) -> None:
        del stopped  # The job changes its state when the gang has ended.

    def _on_ended(self, ended: worker_pb2.GangEnded) -> None:
        self._ended = ended

    def _confirm(self) -> None:
        self._attempt = attempts.move_attempt(
            self._conn, self._job, self._attempt, AttemptState.ACTIVE, now_us=self._now_us
        )
        self._reload()

    def _advance(self, to: JobState) -> None:
        """Moves the job forward, unless it is CANCELLING or RECOVERING, or has that state already."""
        self._flush()
        if may_move(self._job.state, to):
            self._job = jobs.move(self._conn, self._job, to, now_us=self._now_us).job

    def _append(self, kind: EventKind, event: job_pb2.JobEvent) -> None:
        self._drafts.append(encode.draft(kind, event, self._attempt.epoch))

    def _flush(self) -> None:
        for metric, points in self._points.items():
            metrics.add_points(self._conn, self._job.uid, metric, points)
        self._job = jobs.record(self._conn, self._job, self._changes, self._drafts, self._now_us)
        if self._attempt_changes:
            self._attempt = attempts.change_attempt(self._conn, self._attempt, self._attempt_changes)
        self._drafts, self._changes, self._attempt_changes, self._points = [], {}, {}, {}

    def _reload(self) -> None:
        job = jobs.get_job_by_uid(self._conn, self._job.uid)
        assert job is not None
        self._job = job


def record_checkpoint(conn: Connection, job: JobRecord, record: CheckpointRecord, now_us: int) -> bool:
    """Adds a committed checkpoint with its event, and updates the job's newest and best. False: it was known."""
    if not checkpoints.record_checkpoint(conn, record):
        return False
    append_checkpoint_event(conn, job, record, job_pb2.CheckpointChanged.CHANGE_COMMITTED, now_us)
    name = job.checkpoint_name(record.epoch, record.step)
    changes: dict[str, Any] = {"latest_checkpoint": name}
    value = _value(job, record)
    if value is not None and (job.best_value is None or value < job.best_value):
        changes.update(best_checkpoint=name, best_value=value)
    jobs.change_job(conn, job.uid, now_us, changes)
    return True


def forget_checkpoint(conn: Connection, job: JobRecord, record: CheckpointRecord, now_us: int) -> None:
    """Replaces a checkpoint that is gone as the job's newest or best."""
    name = job.checkpoint_name(record.epoch, record.step)
    if name not in (job.latest_checkpoint, job.best_checkpoint):
        return
    left = checkpoints.committed_checkpoints(conn, job.uid)
    valued = [(value, each) for each in left if (value := _value(job, each)) is not None]
    best = min(valued, key=lambda pair: pair[0]) if valued else None
    changes = {
        "latest_checkpoint": job.checkpoint_name(left[0].epoch, left[0].step) if left else "",
        "best_checkpoint": job.checkpoint_name(best[1].epoch, best[1].step) if best else "",
        "best_value": best[0] if best else None,
    }
    jobs.change_job(conn, job.uid, now_us, changes)


def append_checkpoint_event(
    conn: Connection,
    job: JobRecord,
    record: CheckpointRecord,
    change: job_pb2.CheckpointChanged.Change.ValueType,
    now_us: int,
    *,
    message: str = "",
) -> None:
    """Appends the event of a checkpoint's change."""
    change_message = job_pb2.CheckpointChanged(
        checkpoint=job.checkpoint_name(record.epoch, record.step),
        change=change,
        step=record.step,
        size_bytes=record.size_bytes,
        message=message,
    )
    event = job_pb2.JobEvent(checkpoint=change_message)
    events.append(conn, job.uid, [encode.draft(EventKind.CHECKPOINT, event, job.epoch)], now_us)


def with_condition(held: bytes, condition: job_pb2.Condition) -> bytes:
    """The job's conditions after this one has begun or ended."""
    before = job_pb2.Job.FromString(held).conditions
    kept = [each for each in before if each.type != condition.type]
    if condition.active:
        kept.append(condition)
    return job_pb2.Job(conditions=kept).SerializeToString()


def _value(job: JobRecord, record: CheckpointRecord) -> float | None:
    """What checkpoints are compared by, the lower the better: the job's metric in their evaluation."""
    metric = spec_pb2.JobSpec.FromString(job.resolved_spec).evaluation.metric or "loss"
    found = job_pb2.Evaluation.FromString(record.metrics).metrics.get(metric)
    if found is None or not math.isfinite(found):
        return None
    known = plan_pb2.JobPlan.FromString(job.plan).metrics
    return -found if any(each.name == metric and each.higher_is_better for each in known) else found
