"""One rank's process, from its AttemptSpec to its exit code. Heavy packages are imported on the way, where needed.

Its results: on rank 0 an exported model (or data set) and events; on a failure, on every rank, a FailureReport and exit
code 1.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.training.config import resolved_spec
from shardyard_trainer.training.report import PrintingReporter, Reporter, SendingReporter, SendReport

if TYPE_CHECKING:  # Importing these costs seconds; output and reports work before.
    from shardyard_trainer.training.context import Context
    from shardyard_trainer.training.gang import Gang

_T = TypeVar("_T")

START_LIMIT_S = 900.0
PEER_GRACE_S = 1.0


def run(attempt_spec: bytes, rank: int, local_rank: int, send: SendReport | None) -> None:
    """Runs one rank of a serialised AttemptSpec. Without `send` it prints what it would report.

    Raises: SystemExit(1) after it has reported its failure.
    """
    attempt = worker_pb2.AttemptSpec.FromString(attempt_spec)
    _prepare_process(attempt)
    rank_run = _RankRun(attempt, rank, local_rank, _reporter(attempt, rank, send))
    try:
        if send is not None:
            os.umask(0o077)  # Whatever the umask of a cluster's own processes is.
            _redirect_output(Path(attempt.attempt_dir), rank)
        else:
            _make_folders(attempt)
        rank_run.run()
    except Exception as error:  # The worker's edge: every failure becomes a report with a cause.
        rank_run.fail(error)
        raise SystemExit(1) from error
    rank_run.reporter.close()


class _RankRun:
    """One rank's way through an attempt; it knows how far it has come when it fails."""

    def __init__(self, attempt: worker_pb2.AttemptSpec, rank: int, local_rank: int, reporter: Reporter) -> None:
        self.reporter = reporter
        self._attempt = attempt
        self._rank = rank
        self._local_rank = local_rank
        self._phase = "starting"
        self._step: int | None = None

    def run(self) -> None:
        """Runs the attempt on this rank, from preparation to export."""
        from shardyard_trainer.claim import check_storage
        from shardyard_trainer.training.context import Context  # torch.
        from shardyard_trainer.training.telemetry import telemetry

        attempt = self._attempt
        check_storage(attempt.locations)
        with self._limited("the ranks to meet"):
            gang = self._start_gang()
        context = Context(attempt=attempt, gang=gang, reporter=self.reporter, trace=lambda name: None)
        if trace_id := _trace_id(attempt):
            logging.getLogger("shardyard").info("trace %s", trace_id)
        self._report_ready(context)
        with telemetry(
            lambda values: context.sampled(self._step or 0, values), rank=self._rank, device=context.gang.device
        ):
            self._do(context)
            gang.wait_for_all()
        from shardyard_trainer.training.engine import stop_gang  # As above.

        stop_gang()

    def _do(self, context: Context) -> None:
        """What the spec asks for, from preparation to result."""
        from shardyard_trainer.tasks import table  # As above.
        from shardyard_trainer.tasks.base import Output

        output = table.of(self._attempt.spec).output
        if output is Output.DATASET:
            from shardyard_trainer.training.extracting import run as extract  # Only such jobs need it.

            self._enter("extracting")
            extract(self._attempt, context)
        elif output is Output.METRICS:
            self._evaluate(context)
        elif output is Output.FORMAT:
            self._write_format(context)
        else:
            self._train(context)

    def fail(self, error: Exception) -> None:
        """Reports why this rank ends. One that only lost a peer lets the peer report first."""
        from shardyard_trainer.claim import missing_storage  # As below.
        from shardyard_trainer.failures import RunFailed, failure_report, is_lost_peer  # torch.

        logging.getLogger("shardyard").error("%s", error, exc_info=error)
        if is_lost_peer(error):
            time.sleep(PEER_GRACE_S)
        elif not isinstance(error, RunFailed):
            # Whatever a library made of it: without its storage an attempt fails for that.
            error = missing_storage(self._attempt.locations) or error
        report = failure_report(error, attempt=self._attempt.epoch, rank=self._rank, step=self._step, phase=self._phase)
        self.reporter.emit(worker_pb2.WorkerEvent(failure=report), durable=True)
        self.reporter.close()

    def _start_gang(self) -> Gang:
        import torch  # Heavy.

        from shardyard_trainer.training.engine import start_gang  # DeepSpeed.

        torch.set_num_threads(max(self._attempt.threads_per_rank, 1))
        gang: Gang = start_gang(
            rank=self._rank,
            local_rank=self._local_rank,
            world_size=max(self._attempt.world_size, 1),
            rendezvous=self._attempt.rendezvous,
            on_gpu=resolved_spec(self._attempt).resources.gpus_per_worker > 0,
        )
        return gang

    def _train(self, context: Context) -> None:
        from shardyard_trainer.tasks.base import build_module
        from shardyard_trainer.tasks.distillation import prepare_both
        from shardyard_trainer.training.attempt import train_and_export  # torch, DeepSpeed and transformers.
        from shardyard_trainer.training.config import train_config
        from shardyard_trainer.training.engine import Engine
        from shardyard_trainer.training.export import dry_run, export_model
        from shardyard_trainer.training.formats import add_formats
        from shardyard_trainer.training.teacher import Teacher

        attempt, spec = self._attempt, resolved_spec(self._attempt)
        self._enter("tokenizing", context)
        task, lesson = self._build_task(context, spec, prepare_both)
        config = train_config(attempt, num_train_samples=task.train.num_samples)
        self._enter("loading model", context)
        module = build_module(task, spec)
        teacher = Teacher(lesson) if lesson is not None else None
        self._enter("starting engine", context)
        with self._limited("the engine to start"):
            engine = Engine(module, config, context.gang, teacher=teacher)
        train_and_export(
            context,
            task,
            engine,
            config,
            export=partial(export_model, add=partial(add_formats, context)),
            dry_run=dry_run,
            lesson=lesson,
            entered=self._enter,
            stepped=self._stepped,
        )

    def _evaluate(self, context: Context) -> None:
        from shardyard_trainer.planning.evaluation import micro_batch_size  # As above.
        from shardyard_trainer.tasks.base import build_module
        from shardyard_trainer.tasks.model_evaluation import prepare_evaluation
        from shardyard_trainer.training.evaluating import WholeModel, run

        spec = resolved_spec(self._attempt)
        self._enter("tokenizing", context)
        found = self._build_task(context, spec, prepare_evaluation)
        self._enter("loading model", context)
        in_halves = spec.optimization.precision == spec_pb2.PRECISION_BF16
        model = WholeModel(build_module(found.task, found.spec), context.gang, in_halves=in_halves)
        self._enter("evaluating")
        run(context, found.task, model, micro_batch_size=micro_batch_size(spec, found))

    def _write_format(self, context: Context) -> None:
        from shardyard_trainer.tasks.model_evaluation import prepare_evaluation  # As above.
        from shardyard_trainer.training.formats import run

        self._enter("tokenizing", context)
        found = self._build_task(context, resolved_spec(self._attempt), prepare_evaluation)
        self._enter("exporting")
        run(context, found)

    def _build_task(
        self, context: Context, spec: spec_pb2.JobSpec, prepare: Callable[[spec_pb2.JobSpec, worker_pb2.Locations], _T]
    ) -> _T:
        """One rank of a node tokenises into the cache, the others then read it."""
        from shardyard_trainer.planning.identity import check_same_data  # As below.
        from shardyard_trainer.planning.pins import check_same_model  # transformers.

        if self._local_rank > 0:
            context.gang.wait_for_all()
        check_same_data(spec, self._attempt.locations, self._attempt.plan, job_dir=self._attempt.job_dir)
        if self._local_rank == 0:
            check_same_model(spec, self._attempt.locations, self._attempt.plan)
        task = prepare(spec, self._attempt.locations)
        if self._local_rank == 0:
            context.gang.wait_for_all()
        return task

    def _report_ready(self, context: Context) -> None:
        places = context.gang.gather((socket.gethostname(), os.getpid()))
        context.ready(nodes=[node for node, _ in places], pids=[pid for _, pid in places])

    def _enter(self, phase: str, context: Context | None = None) -> None:
        self._phase = phase
        if context is not None:
            context.phase(phase)

    def _stepped(self, step: int) -> None:
        self._step = step

    @contextmanager
    def _limited(self, what: str) -> Iterator[None]:
        """Ends the process if `what` takes longer than any start should: a hang in native code raises nothing."""
        timer = threading.Timer(START_LIMIT_S, self._end_start, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_start(self, what: str) -> None:
        from shardyard_trainer.failures import RunFailed, failure_report  # As above.

        error = RunFailed(
            "ENGINE_START_TIMEOUT",
            f"waited {START_LIMIT_S:.0f} s for {what}",
            "see the ranks' logs for what was being compiled or loaded",
        )
        report = failure_report(error, attempt=self._attempt.epoch, rank=self._rank, step=None, phase=self._phase)
        self.reporter.emit(worker_pb2.WorkerEvent(failure=report), durable=True)
        os._exit(1)


def _reporter(attempt: worker_pb2.AttemptSpec, rank: int, send: SendReport | None) -> Reporter:
    if send is None:
        return PrintingReporter(sys.stdout, quiet=rank > 0)
    return SendingReporter(send, epoch=attempt.epoch, rank=rank, poll_s=1.0 if rank == 0 else None)


def _trace_id(attempt: worker_pb2.AttemptSpec) -> str:
    """The trace that the attempt belongs to, so that its logs are found from there; empty: none."""
    parts = attempt.traceparent.split("-")
    return parts[1] if len(parts) == 4 else ""


def _make_folders(attempt: worker_pb2.AttemptSpec) -> None:
    """Makes the folders that a launcher would have made, for a spec that is run by hand."""
    for folder in (Path(attempt.attempt_dir), Path(attempt.export_dir).parent):
        folder.mkdir(parents=True, exist_ok=True)


def _redirect_output(attempt_dir: Path, rank: int) -> None:
    """Redirects the file descriptors 1 and 2 to the logs, so that output of native code goes there too."""
    folder = attempt_dir / "logs"
    folder.mkdir(exist_ok=True)  # Without its parents: the launch has made them.
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(folder / f"rank-{rank}.{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, descriptor)
        os.close(target)


def _prepare_process(attempt: worker_pb2.AttemptSpec) -> None:
    """Settings that torch reads when it is imported; spinning threads would take the cores of other ranks."""
    threads = str(max(attempt.threads_per_rank, 1))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if resolved_spec(attempt).resources.gpus_per_worker == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
