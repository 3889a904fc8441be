"""What every part of one rank's run is given: the attempt, its gang, the way to report, and named points to trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.gang import Gang
from shardyard_trainer.report import Reporter


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
            self.reporter.emit(event, durable=durable)

    def phase(self, phase: str, message: str = "") -> None:
        """Says that a part that takes time began."""
        self.report(worker_pb2.WorkerEvent(phase=job_pb2.PhaseStarted(phase=phase, message=message)))

    def warn(self, reason: str, message: str, field: str = "") -> None:
        """Says something to know that stops nothing."""
        self.report(worker_pb2.WorkerEvent(warning=job_pb2.Warning(reason=reason, message=message, field=field)))
