"""Runs attempts of the small tasks without a launcher: in this process, or as a gang of processes.

`python -m helpers.trainer_run scenarios.json RANK` makes one rank of a gang that runs one scenario after the other.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# DeepSpeed and OpenMP read these when they are imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from helpers import warm_ranks
from helpers.trainer_tasks import TinyTask
from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.training.attempt import train_and_export
from shardyard_trainer.training.config import train_config
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.engine import Engine, start_gang, stop_gang
from shardyard_trainer.training.gang import Gang
from shardyard_trainer.training.report import PrintingReporter, Reporter, SendingReporter
from shardyard_trainer.training.teacher import Teacher

COMMITTED = job_pb2.CheckpointChanged.CHANGE_COMMITTED


@dataclass
class Scenario:
    """One attempt. `stop_at`: a directive to checkpoint and stop arrives when that step is reported; `poison`: the
    steps (from 0) whose loss is made infinite; `die_at`: a trace point to be killed at, the n-th time it is passed;
    `full_at`: a trace point, the times of passing it at which the disk is full, and the rank that this happens to;
    `late_s`: how long reports that nobody waits for are on their way."""

    folder: str
    task: str = "gpt2"
    zero_stage: int = 0
    world_size: int = 1
    steps: int = 30
    batch_size: int = 12
    micro_batch_size: int = 4
    dropout: float = 0.0
    epoch: int = 1
    checkpoint_every: int = 10
    learning_rate: float = 4e-3
    resume: list[str] = field(default_factory=list)
    stop_at: int = 0
    poison: list[int] = field(default_factory=list)
    die_at: tuple[str, int] = ("", 0)
    full_at: tuple[str, list[int], int] = ("", [], 0)
    dry_run_fails: bool = False
    late_s: float = 0.0
    evaluate_every: int = 10
    metric: str = ""
    select_best: bool = False
    patience: int = 0
    offload: bool = False

    @property
    def attempt_dir(self) -> Path:
        return Path(self.folder) / f"e{self.epoch:06}"

    def spec(self) -> worker_pb2.AttemptSpec:
        attempt = worker_pb2.AttemptSpec(
            job_uid="0" * 32,
            epoch=self.epoch,
            attempt_dir=str(self.attempt_dir),
            export_dir=str(Path(self.folder) / "model"),
            resume_candidates=self.resume,
            world_size=self.world_size,
            log_interval_s=0.01,
        )
        optimization = attempt.spec.optimization
        optimization.max_steps = self.steps
        optimization.global_batch_size = self.batch_size
        optimization.micro_batch_size = self.micro_batch_size
        optimization.learning_rate = self.learning_rate
        optimization.seed = 3
        attempt.spec.parallelism.zero_stage = self.zero_stage
        attempt.spec.parallelism.offload_optimizer = self.offload
        attempt.spec.checkpoints.every = self.checkpoint_every
        evaluation = attempt.spec.evaluation
        evaluation.every, evaluation.metric, evaluation.select_best = self.evaluate_every, self.metric, self.select_best
        if self.patience:
            evaluation.early_stopping.patience = self.patience
        return attempt

    def events(self) -> list[worker_pb2.WorkerEvent]:
        """What rank 0 reported."""
        path = self.attempt_dir / "events"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [worker_pb2.WorkerEvent.FromString(bytes.fromhex(line.decode())) for line in lines]

    def kinds(self) -> list[str | None]:
        return [event.WhichOneof("payload") for event in self.events()]

    def series(self, metric: str = "loss") -> dict[int, float]:
        """Step → value."""
        return {
            point.step: point.value
            for event in self.events()
            for series in event.metrics.series
            if series.metric == metric
            for point in series.points
        }

    def evaluations(self) -> list[job_pb2.Evaluation]:
        """Those of all samples."""
        found = [event.evaluation for event in self.events() if event.HasField("evaluation")]
        return [each for each in found if not each.is_partial]

    def checkpoints(self, change: int = COMMITTED) -> list[worker_pb2.CheckpointReport]:
        return [event.checkpoint for event in self.events() if event.checkpoint.change == change]


class Supervisor:
    """What `send` reaches: writes every event down, and gives the scenario's directive when its time has come."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        scenario.attempt_dir.mkdir(parents=True, exist_ok=True)
        self._path = scenario.attempt_dir / "events"
        self._reply = worker_pb2.ReportReply()

    def send(self, request: bytes) -> bytes:
        message = worker_pb2.ReportRequest.FromString(request)
        if not message.durable:
            time.sleep(self._scenario.late_s)
        for event in message.events:
            with open(self._path, "ab") as out:
                out.write(event.SerializeToString().hex().encode() + b"\n")
            if self._scenario.stop_at and event.progress.step >= self._scenario.stop_at:
                self._reply.directive.action = worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP
                self._reply.directive.reason = "CANCELLED"
        return self._reply.SerializeToString()


@functools.cache
def solo_gang() -> Gang:
    """A gang of this process alone; a process can be in one gang only."""
    torch.set_num_threads(1)
    return start_gang(rank=0, local_rank=0, world_size=1, rendezvous="", on_gpu=False)


def run_scenario(scenario: Scenario, gang: Gang) -> RunFailed | None:
    """Runs one attempt on this rank; its failure, if it is one that the trainer names."""
    reporter: Reporter = PrintingReporter(sys.stdout, quiet=True)
    if gang.is_chief:
        reporter = SendingReporter(Supervisor(scenario).send, epoch=1, rank=0)
    context = Context(attempt=scenario.spec(), gang=gang, reporter=reporter, trace=_trace(scenario, gang.rank))
    task = TinyTask(scenario.task)
    config = train_config(context.attempt, num_train_samples=task.train.num_samples)
    lesson: Any = task.lesson
    teacher = Teacher(lesson) if lesson is not None else None
    engine = Engine(task.module(scenario.dropout), config, gang, teacher=teacher)
    _poison(engine, scenario.poison)
    try:
        train_and_export(
            context,
            task,
            engine,
            config,
            export=export,
            dry_run=refuse if scenario.dry_run_fails else export,
            lesson=lesson,
        )
    except RunFailed as failure:
        return failure
    finally:
        reporter.close()
    return None


def export(engine_module, state_dict, task, attempt, metrics, *, folder, step):  # type: ignore[no-untyped-def]
    """Keeps the weights as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict, folder / "weights.pt")
    return worker_pb2.Exported(path=str(folder))


def refuse(engine_module, state_dict, task, attempt, metrics, *, folder, step):  # type: ignore[no-untyped-def]
    """An export that does not work."""
    raise RunFailed("EXPORT_FAILED", "scripted", "nothing")


def run_gang(folder: Path, scenarios: list[Scenario], *, timeout_s: float = 280) -> list[int]:
    """Runs scenarios of one world size as processes; their exit codes."""
    world_size = scenarios[0].world_size
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps([asdict(scenario) for scenario in scenarios]))
    ranks = []
    for rank in range(world_size):
        with open(folder / f"rank-{rank}.log", "wb") as log:
            arguments = [str(folder), str(rank)]
            ranks.append(
                warm_ranks.start("helpers.trainer_run", arguments, environment=os.environ, stdout=log, stderr=log)
            )
    try:
        return [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _poison(engine: Engine, steps: list[int]) -> None:
    """Wraps the engine's step, so that the loss of some steps is infinite on the last rank only."""
    plain = engine.train_step

    def train_step(micros, *, num_units, step, learning_rate):  # type: ignore[no-untyped-def]
        if step in steps:
            module = engine.module
            forward = module.forward

            def infinite(**inputs):  # type: ignore[no-untyped-def]
                output = forward(**inputs)
                return output._replace(loss_sum=output.loss_sum * torch.inf)

            module.forward = infinite
            try:
                return plain(micros, num_units=num_units, step=step, learning_rate=learning_rate)
            finally:
                del module.forward
        return plain(micros, num_units=num_units, step=step, learning_rate=learning_rate)

    engine.train_step = train_step  # type: ignore[method-assign]


def _trace(scenario: Scenario, rank: int):  # type: ignore[no-untyped-def]
    passed: Counter[str] = Counter()

    def point(name: str) -> None:
        passed[name] += 1
        if (name, passed[name]) == tuple(scenario.die_at):
            os.kill(os.getpid(), signal.SIGKILL)
        full_point, times, full_rank = scenario.full_at
        if name == full_point and passed[name] in times and rank == full_rank:
            raise OSError(errno.ENOSPC, "No space left on device", str(scenario.attempt_dir))

    return point


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    scenarios = [Scenario(**values) for values in json.loads((folder / "scenarios.json").read_text())]
    torch.set_num_threads(1)
    gang = start_gang(
        rank=rank,
        local_rank=rank,
        world_size=scenarios[0].world_size,
        rendezvous=f"file://{folder / 'rendezvous'}",
        on_gpu=False,
    )
    for scenario in scenarios:
        failure = run_scenario(scenario, gang)
        if failure is not None and rank == 0:
            (scenario.attempt_dir / "failure").write_text(failure.cause)
    stop_gang()


if __name__ == "__main__":
    main()
