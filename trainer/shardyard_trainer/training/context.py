"""What every part of one rank's run is given: the attempt, its gang, the way to report, and named points to trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.training.gang import Gang
from shardyard_trainer.training.report import Reporter

_log = logging.getLogger("shardyard")


@dataclass(frozen=True)
class Context:
    """One rank's surroundings. Only rank 0's progress is reported; every rank reports its own failure."""

    attempt: worker_pb2.AttemptSpec
    gang: Gang
    reporter: Reporter
    trace: Callable[[str], None]

    def report(self, event: worker_pb2.WorkerEvent, *, durable: bool = True) -> None:
        """Reports, on rank 0."""
        if self.gang.is_chief:
            if line := log_line(event):
                _log.info(line)
            self.reporter.emit(event, durable=durable)

    def phase(self, phase: str, message: str = "") -> None:
        """Says that a part that takes time began."""
        self.report(worker_pb2.WorkerEvent(phase=job_pb2.PhaseStarted(phase=phase, message=message)))

    def warn(self, reason: str, message: str, field: str = "") -> None:
        """Says something to know that stops nothing."""
        self.report(worker_pb2.WorkerEvent(warning=job_pb2.Warning(reason=reason, message=message, field=field)))


def log_line(event: worker_pb2.WorkerEvent) -> str:
    """What rank 0's log says of an event; empty: nothing."""
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
            return f"checkpoint of step {event.checkpoint.step}: {event.checkpoint.path} {event.checkpoint.message}"
        case "resumed":
            return f"resumed from {event.resumed.path}" if event.resumed.path else "from the beginning"
        case "warning":
            return f"{event.warning.reason}: {event.warning.message}"
        case "exported":
            return f"exported to {event.exported.path}"
        case _:
            return ""


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
