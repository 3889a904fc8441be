"""The training loop, with the canary, evaluations, checkpoints and stops between its steps.

All ranks run it in step. Only rank 0 knows the clock and the directives, so it decides for everyone: its decision about
the boundary after a step is sent before the step begins, in the same all-reduce as the counts of the next batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardyard_trainer.failures import RunFailed
from shardyard_trainer.tasks.base import AnswersWithLabels, Prepared
from shardyard_trainer.training.batches import Batches, RankBatch
from shardyard_trainer.training.checkpoint import Checkpoints, RunState
from shardyard_trainer.training.config import TrainConfig
from shardyard_trainer.training.context import CHECKPOINT_AND_STOP, Context
from shardyard_trainer.training.engine import Engine, StepResult
from shardyard_trainer.training.evaluate import evaluate, evaluated_tokens, evaluation_order, measure
from shardyard_trainer.training.learning import LearningWatch
from shardyard_trainer.training.outlook import Outlook
from shardyard_trainer.training.progress import StepCounts, StepLog, StepTimes
from shardyard_trainer.training.selection import Selection

CANARY_STEP = 2
CANARY_BATCHES = 4
LOOKED_AT = 64
"""Samples whose answers are compared a tenth into the run."""

CHECKPOINTS_APART_S = 60.0
LEFT_OUT_BEFORE_FAILURE = 3


class Decision(NamedTuple):
    """Rank 0's decision for the boundary after a step; numbers, because a sum with its peers' zeros broadcasts them."""

    log: float = 0.0
    evaluate: float = 0.0
    save: float = 0.0
    action: float = 0.0


class Finished(NamedTuple):
    """The step whose weights are to be exported, and the metrics of their evaluation."""

    step: int
    metrics: dict[str, float]


@dataclass
class Run:
    """One attempt on one rank, ready to train from `state.step` on."""

    context: Context
    config: TrainConfig
    task: Prepared
    engine: Engine
    batches: Batches
    checkpoints: Checkpoints
    log: StepLog
    watch: LearningWatch
    outlook: Outlook
    selection: Selection
    state: RunState
    dry_run: Callable[[], None]
    is_fresh: bool


def train(run: Run, stepped: Callable[[int], None] = lambda step: None) -> bool:
    """Trains to the last step, or until no evaluation improves; false if a directive stopped it earlier.

    `stepped` is called with each step made.
    """
    state, config = run.state, run.config
    # The first batch has no step before it beside which to agree, and no decision to wait for.
    batch, counts = _first_batch(run)
    while state.step < config.total_steps and not run.selection.is_over:
        started_s = time.monotonic()
        # Begin to agree on the next step before this one: the all-reduce then runs beside the step's computation. It
        # costs one step of delay: a directive that arrives during a step is followed after the next one.
        next_batch, agreement = _agree_ahead(run)
        rate = config.schedule.learning_rate(state.step)
        result = run.engine.train_step(batch.micros, num_units=counts.units, step=state.step, learning_rate=rate)
        state.step += 1
        state.tokens += int(counts.tokens)
        stepped(state.step)
        times = StepTimes(time.monotonic() - started_s, run.batches.waited_s)
        run.log.record(state, result, rate, counts, times)
        _stop_when_diverged(run, result)
        # Swap batch and counts together, and only here: everything above is about the step just made.
        tokens, batch, (counts, decision) = counts.tokens, next_batch, agreement()
        run.outlook.stepped(time.monotonic() - started_s, tokens)
        if run.is_fresh and state.step == min(CANARY_STEP, config.total_steps):
            canary(run)
        if decision.log:
            run.log.flush(state)
        if state.step == run.watch.early:
            _look_at_answers(run)
        metrics = _compare(run) if decision.evaluate else {}
        if run.selection.is_over:
            reason = run.selection.why_over(config.total_steps)
            run.context.warn("STOPPED_EARLY", reason, "spec.evaluation.early_stopping")
        if decision.action:
            _stop(run, int(decision.action), metrics)
            return False
        if decision.save or run.selection.needs_checkpoint(state.step):
            _save(run, metrics)
    run.log.flush(state)
    return True


def finish(run: Run) -> Finished:
    """The final checkpoint, and the engine with the weights to export, whose evaluation is the job's number."""
    step, selects = run.state.step, run.config.selection.select_best
    metrics = run.selection.metrics_at(step)
    if not metrics:
        metrics = _compare(run, is_final=not selects)
    elif not selects:
        _report_again(run, Finished(step, metrics))
    if run.checkpoints.last_step < step:
        _save(run, metrics, is_required=True)
    run.context.finished(step)
    finished = Finished(step, metrics)
    if selects:
        finished = _take_best(run, finished)
        _report_again(run, finished)
    if warning := run.task.judge(finished.metrics):
        run.context.warn(*warning)
    return finished


def _report_again(run: Run, evaluated: Finished) -> None:
    """Reports an evaluation as the final one; to compute it again may take as long as training if it writes texts."""
    if run.task.eval is not None:
        num_samples = run.task.eval.num_samples
        run.context.evaluated(*evaluated, num_samples=num_samples, is_final=True, is_partial=False)


def _take_best(run: Run, last: Finished) -> Finished:
    """Loads the weights of the best evaluation into the engine; those of the `last` step if they are lost."""
    best = run.selection.best
    if best is None or best.step == last.step:
        return last
    if run.checkpoints.load_weights(best.step):
        # An earlier version kept only the value that decided.
        is_whole = best.metrics.keys() == last.metrics.keys()
        return Finished(best.step, best.metrics if is_whole else _evaluate(run, step=best.step))
    text = f"the checkpoint of step {best.step}, which has the best evaluation, is lost: the last step is exported"
    run.context.warn("BEST_STEP_LOST", text, "spec.evaluation.select_best")
    return last


def canary(run: Run) -> None:
    """After the first steps, does once everything that the end needs, so that what would fail there fails here.

    Only a fresh run has one: a resumed run starts from a checkpoint, which its canary or a later step has written.
    """
    started_s = time.monotonic()
    run.context.phase("canary")
    run.log.flush(run.state)
    # How many of the samples this takes depends on the workers: it is compared with no other evaluation.
    _evaluate(run, max_batches=CANARY_BATCHES)
    folder = _save(run, {}, is_required=True)
    _, problem = run.checkpoints.verify(folder)
    if problem:
        raise RunFailed(
            "CHECKPOINT_CORRUPT", f"the first checkpoint does not read back: {problem}", "check the storage"
        )
    tried_s = time.monotonic()
    run.dry_run()
    run.outlook.exported(time.monotonic() - tried_s)
    run.context.canary_passed(time.monotonic() - started_s)


def _look_at_answers(run: Run) -> None:
    """Warns early in a run whose answers are alike and no better than the labels' frequencies. A collective."""
    task, context = run.task, run.context
    if task.eval is None or not run.watch.knows_labels or not isinstance(task, AnswersWithLabels):
        return
    most = max(LOOKED_AT, context.gang.world_size * run.config.micro_batch_size)
    chosen = np.random.default_rng(run.config.seed).permutation(task.eval.num_samples)[:most]
    order = evaluation_order(task.eval, chosen)
    metrics = measure(context, run.engine, task, order, micro_batch_size=run.config.micro_batch_size)
    if context.gang.is_chief and (found := task.judge(metrics)):
        what = found.message.partition(":")[0]
        if verdict := run.watch.see_answers(what, metrics["loss"], len(order)):
            warn_of(context, verdict)


def warn_of(context: Context, verdict: str) -> None:
    """Reports that a run does not learn."""
    advice = "try a lower learning rate, a longer warm-up or other data"
    context.warn("NOT_LEARNING", f"the model does not learn: {verdict}; {advice}", "spec.optimization")


def _first_batch(run: Run) -> tuple[RankBatch, StepCounts]:
    batch = run.batches.next()
    units, tokens, positions = run.context.gang.sum_ahead(_counts(batch))()
    return batch, StepCounts(units, tokens, positions)


def _agree_ahead(run: Run) -> tuple[RankBatch, Callable[[], tuple[StepCounts, Decision]]]:
    """The next batch; and, once waited for, its counts over all ranks and rank 0's decision after this step."""
    batch = run.batches.next()
    decision = Decision()
    if run.context.gang.is_chief:
        decision = _decide(run)
        run.watch.see_labels(batch.micros[0].batch.inputs)
    sums = run.context.gang.sum_ahead([*_counts(batch), *decision])

    def agreed() -> tuple[StepCounts, Decision]:
        units, tokens, positions, *decided = sums()
        return StepCounts(units, tokens, positions), Decision(*decided)

    return batch, agreed


def _counts(batch: RankBatch) -> list[float]:
    return [float(batch.num_units), float(batch.num_tokens), float(batch.num_positions)]


def _decide(run: Run) -> Decision:
    """What follows the step that is about to begin; canary and end have their own evaluation and checkpoint."""
    step, total = run.state.step + 1, run.config.total_steps
    is_between = (CANARY_STEP if run.is_fresh else 0) < step < total
    now_s = time.monotonic()
    return Decision(
        log=float(now_s - run.log.last_flush_s >= run.config.log_interval_s),
        evaluate=float(is_between and step % run.config.evaluate_every == 0),
        save=float(is_between and _is_checkpoint_due(run, step, now_s)),
        action=float(run.context.directive),
    )


def _is_checkpoint_due(run: Run, step: int, now_s: float) -> bool:
    if run.config.checkpoint_every:
        return step % run.config.checkpoint_every == 0
    # By default after each tenth of the run, but a minute apart: a short run would only write checkpoints. The clock
    # differs between ranks, so only rank 0 may ask this.
    tenth = -(-run.config.total_steps // 10)
    is_apart = now_s - run.checkpoints.last_time_s >= CHECKPOINTS_APART_S
    return is_apart and step // tenth > run.checkpoints.last_step // tenth


def _compare(run: Run, *, is_final: bool = False) -> dict[str, float]:
    """Evaluates all samples, and sees whether that is the best so far. Rank 0's numbers decide, on every rank."""
    metrics: dict[str, float] = run.context.gang.from_chief(_evaluate(run, is_final=is_final))
    run.selection.see(run.state.step, metrics)
    return metrics


def _evaluate(
    run: Run, *, max_batches: int | None = None, is_final: bool = False, step: int | None = None
) -> dict[str, float]:
    """Evaluates the engine's weights, which are those after `step`; None: after the last step made."""
    started_s = time.monotonic()
    metrics = evaluate(
        run.context,
        run.engine,
        run.task,
        step=run.state.step if step is None else step,
        micro_batch_size=run.config.micro_batch_size,
        max_batches=max_batches,
        is_final=is_final,
    )
    if run.task.eval is not None:
        at_once = run.context.gang.world_size * run.config.micro_batch_size
        tokens = evaluated_tokens(run.task.eval, None if max_batches is None else max_batches * at_once)
        run.outlook.evaluated(time.monotonic() - started_s, tokens)
    return metrics


def _save(run: Run, metrics: dict[str, float], *, is_required: bool = False) -> Path:
    """Saves a checkpoint of this step, after reporting everything recorded so far, so that its state is complete."""
    run.log.flush(run.state)
    started_s = time.monotonic()
    run.state.learning = run.watch.state_dict()
    run.state.selection = run.selection.state_dict()
    if not run.checkpoints.save(run.state, metrics, is_required=is_required):
        run.selection.lose(run.state.step)
    run.outlook.saved(time.monotonic() - started_s)
    return run.checkpoints.folder(run.state.step)


def _stop(run: Run, action: int, metrics: dict[str, float]) -> None:
    """Follows a directive of the supervisor at a step boundary; `metrics` are of the evaluation there, if any."""
    run.log.flush(run.state)
    checkpoint_step = 0
    if action == CHECKPOINT_AND_STOP:
        if run.checkpoints.last_step < run.state.step:
            _save(run, metrics)
        checkpoint_step = run.checkpoints.last_step
    run.context.stopped(checkpoint_step=checkpoint_step)


def _stop_when_diverged(run: Run, result: StepResult) -> None:
    """Warns of a step that was skipped because loss or gradient was not finite; several in a row, or all, end the run.

    Raises: RunFailed(LOSS_DIVERGED), on all ranks alike: a rank alone would leave the others waiting in a collective.
    """
    state = run.state
    if result.applied:
        state.skipped_in_row = 0
        return
    state.skipped_in_row += 1
    run.context.warn("STEP_LEFT_OUT", f"loss or gradient of step {state.step} is not finite; the step was left out")
    if state.skipped_in_row >= min(LEFT_OUT_BEFORE_FAILURE, run.config.total_steps):
        run.log.flush(state)
        raise RunFailed(
            "LOSS_DIVERGED",
            f"loss or gradient was not finite in {state.skipped_in_row} steps in a row, the last of them {state.step}; "
            f"the learning rate was {run.config.schedule.learning_rate(state.step - 1):.3g}",
            "lower optimization.learning_rate, or lengthen the warm-up",
            {"step": str(state.step), "window": str(state.skipped_in_row)},
        )
