# Made from the async source by client/generate_sync.py: change that, never this.
"""One job: watch it, wait for it, inspect it, stop it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

from shardyard._convert import read, read_event
from shardyard._lines import sentences
from shardyard._messages import build, build_duration
from shardyard._names import last_part
from shardyard._requests import event_kinds
from shardyard._sync import runtime
from shardyard._sync.connection import Connection
from shardyard._sync.resources import Dataset, Model, pages
from shardyard._text import escaped
from shardyard._updates import UpdateFields, update_request
from shardyard.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    JobCancelled,
    JobFailed,
    invalid,
)
from shardyard.types import Attempt, Checkpoint, Event, ExportedFormat, JobInfo, LogLine, MetricSeries
from shardyard.v1 import (
    checkpoint_service_pb2,
    dataset_service_pb2,
    job_pb2,
    job_service_pb2,
    log_service_pb2,
    metric_service_pb2,
    model_service_pb2,
)

_WAIT_S = 60.0
_MOST_GAPS = 5


class Job:
    """A job of the service. `info` is its state when it was last read; `refresh()` reads it again."""

    def __init__(self, connection: Connection, message: job_pb2.Job) -> None:
        self._connection = connection
        self.message = message

    def __repr__(self) -> str:
        return f"<Job {self.name} {self.state}>"

    @property
    def name(self) -> str:
        """`projects/{project}/jobs/{job}`."""
        return self.message.name

    @property
    def id(self) -> str:
        """The last part of the name."""
        return last_part(self.message.name)

    @property
    def uid(self) -> str:
        """Never reused, unlike the name."""
        return self.message.uid

    @property
    def info(self) -> JobInfo:
        """The job as it was read last."""
        return read(JobInfo, self.message)

    @property
    def state(self) -> str:
        """The state as it was read last: `queued`, `running`, `succeeded`, …"""
        return self.info.state

    def refresh(self) -> JobInfo:
        """Reads the job again and updates `info`."""
        request = job_service_pb2.GetJobRequest(name=self.name)
        self.message = self._connection.call(self._connection.jobs.GetJob, request)
        return self.info

    def watch(self, *, after: int = 0, kinds: Sequence[str] = (), min_interval: float | None = None) -> Iterator[Event]:
        """Every event after the sequence `after`, each exactly once, until the job has ended.

        A broken connection is reopened, and the stream continues at the same event. Ending a watch never stops the job.
        Raises: RequestError; Aborted JOB_REPLACED if the name now belongs to another job; DataLoss EVENT_GAP.
        """
        wanted = event_kinds(kinds)
        interval = None if min_interval is None else build_duration("min_interval", min_interval)
        cursor, gaps = after, 0

        def request() -> job_service_pb2.WatchJobRequest:
            return build(
                job_service_pb2.WatchJobRequest,
                name=self.name,
                job_uid=self.uid,
                after_sequence=cursor,
                kinds=wanted,
                min_interval=interval,
            )

        while gaps <= _MOST_GAPS:
            gap = False
            with runtime.closing(self._connection.streaming(self._connection.jobs.WatchJob, request)) as stream:
                for batch in stream:
                    gap = batch.after_sequence > cursor
                    if gap:
                        break
                    for message in batch.events:
                        if message.sequence <= cursor:
                            continue
                        event = read_event(message)
                        cursor, gaps = event.sequence, 0
                        yield event
                        if event.is_terminal:
                            return
                    cursor = max(cursor, batch.last_sequence)
            gaps += 1
            if not gap and self._has_ended_by(cursor):
                return
        raise DataLoss(f"{self.name}: events after {cursor} do not arrive", reason="EVENT_GAP")

    def wait(self, timeout: float | None = None, *, check: bool = True) -> JobInfo:
        """The job when it has ended; a paused one is waited for until it is resumed or cancelled.

        Raises: JobFailed or JobCancelled unless `check` is False; DeadlineExceeded after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.info.is_terminal:
            left = _WAIT_S if deadline is None else min(_WAIT_S, deadline - time.monotonic())
            if left <= 0:
                words = f"{self.name} is {self.state} after {timeout} s{_why_paused(self.info)}"
                raise DeadlineExceeded(words, reason="DEADLINE_EXCEEDED")
            request = job_service_pb2.WaitJobRequest(name=self.name, timeout=build_duration("timeout", left))
            method = self._connection.jobs.WaitJob
            self.message = self._connection.call_patiently(method, request, timeout=left + 30)
        info = self.info
        if check and info.state != "succeeded":
            raise _job_error(info)
        return info

    def cancel(self, *, lost: bool = False) -> JobInfo:
        """Ask the job to end; returns its new state.

        `lost` says that its gang is gone though the cluster does not answer: the job ends at once.
        Raises: FailedPrecondition INVALID_STATE if it has ended otherwise, or with `lost` if its gang can be reached.
        """
        request = job_service_pb2.CancelJobRequest(name=self.name, lost=lost)
        self.message = self._connection.call(self._connection.jobs.CancelJob, request)
        return self.info

    def pause(self) -> JobInfo:
        """Ask the job to make a checkpoint and free its slots; its new state is `pausing`, or `paused` at once.

        Raises: FailedPrecondition INVALID_STATE once its training is over.
        """
        request = job_service_pb2.PauseJobRequest(name=self.name)
        self.message = self._connection.call(self._connection.jobs.PauseJob, request)
        return self.info

    def resume(self) -> JobInfo:
        """Queue the paused job again: it continues from its newest intact checkpoint.

        Raises: FailedPrecondition INVALID_STATE unless it is paused.
        """
        request = job_service_pb2.ResumeJobRequest(name=self.name)
        self.message = self._connection.call(self._connection.jobs.ResumeJob, request)
        return self.info

    def update(self, *, etag: str = "", **fields: Unpack[UpdateFields]) -> JobInfo:
        """Change what is given: `labels`, `annotations`, `display_name`, `external_uri`; until the job has ended also
        `priority`, `queue`, `retry_max`, `max_run_time` and `keep_last`.

        Of `labels` and `annotations` only the given keys change; a key that is None is removed. With an `etag`, such as
        `info.etag`, the job must not have changed since. Raises: InvalidArgument; Aborted ETAG_MISMATCH;
        FailedPrecondition INVALID_STATE once the job has ended.
        """
        request = update_request(self.name, etag, self._connection.project, fields)
        self.message = self._connection.call(self._connection.jobs.UpdateJob, request)
        return self.info

    def delete(self) -> None:
        """Delete the job, which must have ended; its models stay."""
        self._connection.call(self._connection.jobs.DeleteJob, job_service_pb2.DeleteJobRequest(name=self.name))

    def logs(
        self,
        *,
        follow: bool = False,
        rank: int | None = None,
        attempt: int | None = None,
        level: str | None = None,
        tail: int = 0,
    ) -> Iterator[LogLine]:
        """The lines that the ranks wrote; with `follow` until the job has ended; with `tail` only each rank's last.

        Lines that the service skipped because they were not read in time appear as one line of level `warning`.
        """
        cursor = ""
        min_level = _log_level(level)

        def request() -> log_service_pb2.TailLogsRequest:
            return build(
                log_service_pb2.TailLogsRequest,
                name=self.name,
                rank=rank,
                attempt=attempt,
                min_level=min_level,
                cursor=cursor,
                follow=follow,
                tail_lines=0 if cursor else tail,
            )

        with runtime.closing(self._connection.streaming(self._connection.logs.TailLogs, request)) as stream:
            for batch in stream:
                for line in batch.lines:
                    yield read(LogLine, line)
                cursor = batch.cursor or cursor

    def metrics(
        self,
        *names: str,
        max_points: int | None = None,
        all_attempts: bool = False,
        min_step: int = 0,
        max_step: int = 0,
    ) -> dict[str, MetricSeries]:
        """The history of the metrics named, or of all, downsampled to `max_points` per series."""
        request = build(
            metric_service_pb2.QueryMetricsRequest,
            name=self.name,
            metrics=names,
            max_points=max_points,
            all_attempts=all_attempts,
            min_step=min_step,
            max_step=max_step,
        )
        answer = self._connection.call(self._connection.metrics.QueryMetrics, request)
        return {series.metric: read(MetricSeries, series) for series in answer.series}

    def watch_metrics(self, *names: str) -> Iterator[MetricSeries]:
        """New points as they come, until the job has ended."""
        cursor = ""

        def request() -> metric_service_pb2.WatchMetricsRequest:
            return build(metric_service_pb2.WatchMetricsRequest, name=self.name, metrics=names, cursor=cursor)

        with runtime.closing(self._connection.streaming(self._connection.metrics.WatchMetrics, request)) as stream:
            for batch in stream:
                for series in batch.series:
                    yield read(MetricSeries, series)
                cursor = batch.cursor or cursor

    def attempts(self) -> list[Attempt]:
        """Its gangs, the oldest first."""
        request = job_service_pb2.ListAttemptsRequest(parent=self.name)
        found = pages(self._connection, self._connection.jobs.ListAttempts, request, "attempts")
        return [read(Attempt, message) for message in found]

    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints, the newest first."""
        request = checkpoint_service_pb2.ListCheckpointsRequest(parent=self.name)
        found = pages(self._connection, self._connection.checkpoints.ListCheckpoints, request, "checkpoints")
        return [read(Checkpoint, message) for message in found]

    def model(self) -> Model:
        """The model that it trained.

        Raises: FailedPrecondition while there is none.
        """
        if not self.message.model:
            self.refresh()
        if not self.message.model:
            measured = "; its numbers are in info.evaluation" if self.info.evaluation is not None else ""
            text = f"{self.name} is {self.state} and has no model{measured}"
            raise FailedPrecondition(text, reason="MODEL_NOT_READY")
        request = model_service_pb2.GetModelRequest(name=self.message.model)
        return Model(self._connection, self._connection.call(self._connection.models.GetModel, request))

    def export(self) -> ExportedFormat:
        """The receipt of the format that a `model_export` job has added to its model.

        Raises: FailedPrecondition while there is none.
        """
        found = [each for each in (self.model()).info.exports if each.source_job == self.name]
        if not found:
            raise FailedPrecondition(f"{self.name} is {self.state} and has no format", reason="MODEL_NOT_READY")
        return found[-1]

    def output_dataset(self) -> Dataset:
        """The data set that a feature extraction wrote.

        Raises: FailedPrecondition while there is none.
        """
        if not self.message.output_dataset:
            self.refresh()
        if not self.message.output_dataset:
            raise FailedPrecondition(f"{self.name} is {self.state} and has no data set", reason="DATASET_NOT_READY")
        request = dataset_service_pb2.GetDatasetRequest(name=self.message.output_dataset)
        message = self._connection.call(self._connection.datasets.GetDataset, request)
        return Dataset(self._connection, message)

    def _has_ended_by(self, cursor: int) -> bool:
        """Whether a stream may end before a terminal event: the job has ended, and all its events were seen."""
        request = job_service_pb2.GetJobRequest(name=self.name)
        self.message = self._connection.call_patiently(self._connection.jobs.GetJob, request)
        return self.info.is_terminal and self.message.last_event_sequence <= cursor


def _why_paused(info: JobInfo) -> str:
    if info.state != "paused":
        return ""
    failure = info.failure
    why = f": {failure.reason}: {sentences(failure.message, failure.next_step)}" if failure else ""
    return why or "; resume it to continue"


def _job_error(info: JobInfo) -> JobFailed | JobCancelled:
    failure = info.failure
    if info.state == "cancelled":
        return JobCancelled(f"{info.name} was cancelled", job=info.name, reason="CANCELLED", info=info)
    reason = failure.reason if failure else "UNKNOWN"
    words = sentences(failure.message, failure.next_step) if failure else "no report was left"
    return JobFailed(f"{info.name} failed: {reason}: {words}", job=info.name, reason=reason, info=info)


def _log_level(level: str | None) -> Any:
    if level is None:
        return 0
    value = log_service_pb2.LogLevel.DESCRIPTOR.values_by_name.get(f"LOG_LEVEL_{escaped(str(level)).upper()}")
    if value is None:
        raise invalid("level", f"`{level}` is none of debug, info, warning, error")
    return value.number
