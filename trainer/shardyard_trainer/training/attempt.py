"""One training attempt, once its engine is built: resume or start, train, evaluate, commit, export."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import check_storage
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.distillation import Lesson
from shardyard_trainer.tasks.module import TaskModule
from shardyard_trainer.training.batches import Batches
from shardyard_trainer.training.before import compare_with_before
from shardyard_trainer.training.checkpoint import Checkpoints, RunState
from shardyard_trainer.training.config import TrainConfig
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.engine import Engine
from shardyard_trainer.training.evaluate import evaluated_tokens
from shardyard_trainer.training.learning import LearningWatch
from shardyard_trainer.training.loop import CANARY_STEP, CHECKPOINTS_APART_S, Finished, Run, finish, train, warn_of
from shardyard_trainer.training.order import Order
from shardyard_trainer.training.outlook import Course, Outlook
from shardyard_trainer.training.progress import StepLog
from shardyard_trainer.training.selection import Selection

BYTES_PER_PARAMETER = 16
"""Of a checkpoint in fp32 with AdamW: the weights twice and two moments; for a plan that does not say."""


class Export(Protocol):
    """Writes the model into `folder` and proves that it works; on rank 0 alone."""

    def __call__(
        self,
        engine_module: TaskModule,
        state_dict: dict[str, torch.Tensor],
        task: Prepared,
        attempt: worker_pb2.AttemptSpec,
        metrics: dict[str, float],
        *,
        folder: Path,
        step: int,
    ) -> worker_pb2.Exported:
        """Exports, and describes the result. `state_dict` has all weights after `step`, on the CPU, by their names."""


def train_and_export(
    context: Context,
    task: Prepared,
    engine: Engine,
    config: TrainConfig,
    *,
    export: Export,
    dry_run: Export,
    lesson: Lesson | None = None,
    entered: Callable[[str], None] = lambda phase: None,
    stepped: Callable[[int], None] = lambda step: None,
) -> RunState:
    """All of an attempt; ends early, without an export, if a directive asks for it. A collective.

    `entered` is called with each phase, `stepped` with the newest step, for the failure report.
    """
    started_s = time.monotonic()
    order = Order(
        num_samples=task.train.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        lengths=task.train.lengths(),
    )
    if not compare_with_before(context, engine, task, order, config, entered=entered):
        context.stopped()
        return RunState()
    run = build_run(context, task, engine, config, order, dry_run=dry_run, lesson=lesson)
    try:
        if not run.is_fresh:
            run.checkpoints.probe()
            if run.state.step <= CANARY_STEP:
                # The canary's own checkpoint: the attempt before may have ended before it had tried the export.
                run.dry_run()
            context.canary_passed(time.monotonic() - started_s)
        entered("training")
        is_complete = train(run, stepped)
        if is_complete:
            finished = finish(run)
    finally:
        run.batches.close()
    if is_complete:
        entered("exporting")
        context.phase("exporting")
        exported = _export(context, engine, task, finished, export=export, folder=Path(context.attempt.export_dir))
        if exported is not None:
            context.exported(exported)
    return run.state


def build_run(
    context: Context,
    task: Prepared,
    engine: Engine,
    config: TrainConfig,
    order: Order,
    *,
    dry_run: Export,
    lesson: Lesson | None = None,
) -> Run:
    """Puts a run together, from its newest whole checkpoint or from the beginning. A collective."""
    checkpoints = Checkpoints(
        context,
        engine,
        predicted_bytes=config.checkpoint_bytes or _predict_bytes(engine.module),
        zero_stage=config.zero_stage,
    )
    restored = checkpoints.restore()
    state = restored or RunState()
    context.resumed(state.step, checkpoints.restored_from)
    watch = LearningWatch(
        total_steps=config.total_steps,
        warmup_steps=config.schedule.warmup_steps,
        state=state.learning,
        knows_labels=lesson is None,
    )
    outlook = Outlook(
        Course(
            total_steps=config.total_steps,
            evaluate_every=config.evaluate_every,
            evaluation_tokens=evaluated_tokens(task.eval) if task.eval is not None else 0.0,
            checkpoint_every=config.checkpoint_every,
            apart_s=CHECKPOINTS_APART_S,
        )
    )
    policy = config.selection
    if task.eval is not None:
        policy = replace(policy, direction=task.metrics().directions()[policy.metric])
    return Run(
        context=context,
        config=config,
        task=task,
        engine=engine,
        batches=Batches(
            task.train,
            order,
            rank=context.gang.rank,
            world_size=context.gang.world_size,
            micro_batch_size=config.micro_batch_size,
            first_step=state.step,
            taught=lesson.task.train if lesson is not None else None,
        ),
        checkpoints=checkpoints,
        log=StepLog(
            context,
            total_steps=config.total_steps,
            epochs_per_step=config.batch_size / task.train.num_samples,
            see_loss=lambda step, loss: _judge(context, watch, step, loss),
            left_s=outlook.left_s,
        ),
        watch=watch,
        outlook=outlook,
        selection=Selection(policy, state=state.selection),
        state=state,
        dry_run=lambda: _try_export(context, engine, task, state.step, dry_run),
        is_fresh=restored is None,
    )


def _judge(context: Context, watch: LearningWatch, step: int, loss: float) -> None:
    verdict = watch.see_loss(step, loss)
    if verdict is not None:
        warn_of(context, verdict)


def _export(
    context: Context, engine: Engine, task: Prepared, finished: Finished, *, export: Export, folder: Path
) -> worker_pb2.Exported | None:
    """Gathers the weights on rank 0, which exports them; the others wait for it."""
    check_storage(context.attempt.locations)
    state_dict = engine.gather_state_dict()
    exported = None
    if state_dict is not None:
        step, metrics = finished
        exported = export(engine.module, state_dict, task, context.attempt, metrics, folder=folder, step=step)
    context.gang.wait_for_all()
    return exported


def _try_export(context: Context, engine: Engine, task: Prepared, step: int, dry_run: Export) -> None:
    """Exports into a folder that is thrown away."""
    parent = Path(context.attempt.attempt_dir)
    folder = Path(tempfile.mkdtemp(prefix="export-dry-run-", dir=parent)) if context.gang.is_chief else parent
    try:
        _export(context, engine, task, Finished(step, {}), export=dry_run, folder=folder)
    finally:
        if context.gang.is_chief:
            shutil.rmtree(folder, ignore_errors=True)


def _predict_bytes(module: TaskModule) -> int:
    numbers = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
    return numbers * BYTES_PER_PARAMETER
