"""The context of one rank's run: the attempt, its gang, the reporter, and named points to trace.

The parts of a run say what happened in verbs (`evaluated`, `checkpointed`, `stopped`, ...); only this module turns
that into WorkerEvents. Each event goes to the supervisor, and a line about it to the log of the rank.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardyard.v1 import job_pb2, metric_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.training.gang import Gang
from shardyard_trainer.training.report import Reporter

CHECKPOINT_AND_STOP = int(worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP)
"""The directive that asks for a checkpoint first. 0 means continue, every other one stop at once."""

_log = logging.getLogger("shardyard")


class Point(NamedTuple):
    """One number of a curve; `time_ns` counts from 1970."""

    step: int
    value: float
    time_ns: int


@dataclass(frozen=True)
class Context:
    """One rank's surroundings.

    Every verb may be called on every rank; rank 0 alone reports, except by `sampled`. When a verb has returned, its
    event is on disk, except for those of `progressed`, `measured` and `sampled`, which wait for nothing.
    """

    attempt: worker_pb2.AttemptSpec
    gang: Gang
    reporter: Reporter
    trace: Callable[[str], None]

    @property
    def directive(self) -> int:
        """What the supervisor wants now, as a number, so that rank 0 can share it with its peers; 0: continue."""
        return int(self.reporter.directive.action)

    def ready(self, *, nodes: Sequence[str], pids: Sequence[int]) -> None:
        """All ranks have met, each in a process on a node."""
        self._report(worker_pb2.WorkerEvent(ready=worker_pb2.GangReady(nodes=nodes, pids=pids)))

    def phase(self, phase: str, message: str = "") -> None:
        """A part that takes time begins."""
        self._report(worker_pb2.WorkerEvent(phase=job_pb2.PhaseStarted(phase=phase, message=message)))

    def warn(self, reason: str, message: str, field: str = "") -> None:
        """Reports a warning, which does not stop the run."""
        self._report(worker_pb2.WorkerEvent(warning=job_pb2.Warning(reason=reason, message=message, field=field)))

    def resumed(self, step: int, path: str) -> None:
        """The run continues after `step` from the checkpoint at `path`; empty: it starts from the beginning."""
        self._report(worker_pb2.WorkerEvent(resumed=worker_pb2.Resumed(step=step, path=path)))

    def canary_passed(self, duration_s: float) -> None:
        """Reports that everything the end needs has worked once."""
        self._report(worker_pb2.WorkerEvent(canary=job_pb2.CanaryPassed(duration_s=duration_s)))

    def progressed(
        self,
        step: int,
        *,
        total_steps: int,
        tokens: int,
        tokens_per_s: float,
        data_epoch: float = 0.0,
        loss: float = 0.0,
        learning_rate: float = 0.0,
        grad_norm: float = 0.0,
        padding_share: float = 0.0,
        peak_memory_bytes: int = 0,
        eta_s: float | None = None,
    ) -> None:
        """So many steps are made; the numbers are those of `Progress` in job.proto."""
        progress = job_pb2.Progress(
            step=step,
            total_steps=total_steps,
            data_epoch=data_epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_s=tokens_per_s,
            padding_share=padding_share,
            peak_memory_bytes=peak_memory_bytes,
        )
        if eta_s is not None:
            progress.eta.FromNanoseconds(int(eta_s * 1e9))
        self._report(worker_pb2.WorkerEvent(progress=progress), durable=False)

    def measured(self, curves: Mapping[str, Sequence[Point]]) -> None:
        """New points of curves, by the names of the metrics; those that are not finite are left out."""
        metrics = worker_pb2.Metrics(series=[_series(name, points) for name, points in curves.items()])
        self._report(worker_pb2.WorkerEvent(metrics=metrics), durable=False)

    def sampled(self, step: int, values: Mapping[str, float]) -> None:
        """What this rank's process uses now, after `step`: each rank reports its own, from any thread."""
        now_ns = time.time_ns()
        series = [
            _series(f"system/{name}/{self.gang.rank}", [Point(step, value, now_ns)]) for name, value in values.items()
        ]
        self.reporter.emit(worker_pb2.WorkerEvent(metrics=worker_pb2.Metrics(series=series)))

    def evaluated(
        self, step: int, metrics: Mapping[str, float], *, num_samples: int, is_final: bool, is_partial: bool
    ) -> None:
        """The metrics at `step`, over `num_samples`; partial: over some of the evaluation data."""
        evaluation = job_pb2.Evaluation(
            step=step, metrics=metrics, num_samples=num_samples, is_final=is_final, is_partial=is_partial
        )
        self._report(worker_pb2.WorkerEvent(evaluation=evaluation))

    def checkpointed(self, step: int, path: str, *, size_bytes: int, metrics: Mapping[str, float]) -> None:
        """The checkpoint at `path` is committed, with the evaluation at its step."""
        report = worker_pb2.CheckpointReport(
            change=job_pb2.CheckpointChanged.CHANGE_COMMITTED,
            path=path,
            epoch=self.attempt.epoch,
            step=step,
            size_bytes=size_bytes,
            world_size=self.gang.world_size,
            metrics=metrics,
        )
        self._report(worker_pb2.WorkerEvent(checkpoint=report))

    def found_corrupt(self, step: int, path: str, *, epoch: int, problem: str) -> None:
        """A committed checkpoint, of attempt `epoch`, does not read back; `problem` names the file and the damage."""
        report = worker_pb2.CheckpointReport(
            change=job_pb2.CheckpointChanged.CHANGE_CORRUPT, path=path, epoch=epoch, step=step, message=problem
        )
        self._report(worker_pb2.WorkerEvent(checkpoint=report))

    def disk_pressure(self, message: str, *, active: bool, durable: bool = True) -> None:
        """The storage has no room for checkpoints, or has room again."""
        condition = job_pb2.Condition(type=job_pb2.Condition.TYPE_DISK_PRESSURE, active=active, message=message)
        condition.time.GetCurrentTime()
        self._report(worker_pb2.WorkerEvent(condition=condition), durable=durable)

    def stopped(self, *, checkpoint_step: int = 0) -> None:
        """The run ends as the directive asks, with its last checkpoint at `checkpoint_step` if that was wanted."""
        reason = self.reporter.directive.reason
        self._report(worker_pb2.WorkerEvent(stopped=worker_pb2.Stopped(reason=reason, checkpoint_step=checkpoint_step)))

    def finished(self, step: int) -> None:
        """Reports that all steps are made."""
        self._report(worker_pb2.WorkerEvent(finished=worker_pb2.TrainingFinished(step=step)))

    def exported(self, exported: worker_pb2.Exported) -> None:
        """Reports that the result is in place."""
        self._report(worker_pb2.WorkerEvent(exported=exported))

    def settle(self) -> None:
        """Returns when all reports so far are on disk."""
        self.reporter.settle()

    def _report(self, event: worker_pb2.WorkerEvent, *, durable: bool = True) -> None:
        if self.gang.is_chief:
            if line := log_line(event):
                _log.info(line)
            self.reporter.emit(event, durable=durable)


def log_line(event: worker_pb2.WorkerEvent) -> str:
    """The line of an event in rank 0's log; empty if it has none."""
    match event.WhichOneof("payload"):
        case "phase":
            return event.phase.phase
        case "progress":
            made = event.progress
            speed = f"lr {made.learning_rate:.3g}  {made.tokens_per_s:.0f} tokens/s"
            return f"step {made.step}/{made.total_steps}  loss {made.loss:.4f}  {speed}"
        case "evaluation":
            return f"evaluation at step {event.evaluation.step}: {_numbers(event.evaluation.metrics)}"
        case "checkpoint":
            return _checkpoint_line(event.checkpoint)
        case "resumed":
            return f"resumed from {event.resumed.path}" if event.resumed.path else "from the beginning"
        case "warning":
            return f"{event.warning.reason}: {event.warning.message}"
        case "condition":
            return event.condition.message
        case "exported":
            return f"exported to {event.exported.path}" if event.exported.path else ""
        case _:
            return ""


def _checkpoint_line(report: worker_pb2.CheckpointReport) -> str:
    if report.change == job_pb2.CheckpointChanged.CHANGE_CORRUPT:
        return f"checkpoint of step {report.step} is damaged: {report.path}: {report.message}"
    return f"checkpoint of step {report.step}: {report.path}"


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


def _series(name: str, points: Sequence[Point]) -> metric_service_pb2.MetricSeries:
    series = metric_service_pb2.MetricSeries(metric=name)
    for point in points:
        if math.isfinite(point.value):
            series.points.add(step=point.step, value=point.value).time.FromNanoseconds(point.time_ns)
    return series
