"""One rank of a feature extraction in this process, and the events that it reports."""

from __future__ import annotations

import io

import torch

from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.extracting import run
from shardyard_trainer.training.gang import Gang
from shardyard_trainer.training.report import PrintingReporter


class Recorder(PrintingReporter):
    """Keeps the events; its directive is what the test says after so many progress events."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        super().__init__(io.StringIO())
        self.events: list[worker_pb2.WorkerEvent] = []
        self._stop_after = stop_after

    def emit(self, event: worker_pb2.WorkerEvent, *, durable: bool = False) -> None:
        self.events.append(event)
        made = [each for each in self.events if each.WhichOneof("payload") == "progress"]
        if self._stop_after is not None and len(made) >= self._stop_after:
            self.directive = worker_pb2.Directive(action=worker_pb2.Directive.ACTION_STOP, reason="CANCELLED")

    def kinds(self) -> list[str]:
        return [event.WhichOneof("payload") or "" for event in self.events]


def extract(attempt: worker_pb2.AttemptSpec, reporter: Recorder) -> Recorder:
    gang = Gang(rank=0, world_size=1, device=torch.device("cpu"))
    run(attempt, Context(attempt=attempt, gang=gang, reporter=reporter, trace=lambda name: None))
    return reporter
