"""From a spec to what it would do: inspection and planning are one call (docs/planning.md).

All violations come back at once, with paths from the Job on. The same request over the same files gives the same plan,
and a plan's resolved spec, planned again, gives that plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TypeVar

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import check_storage
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.data.stats import DataStats, loss_warnings
from shardyard_trainer.failures import RunFailed, storage_failure
from shardyard_trainer.planning import memory, resolve
from shardyard_trainer.planning.alternatives import alternatives, does_not_fit
from shardyard_trainer.planning.arithmetic import Batch, BatchRefused, evaluation_interval, plan_batch
from shardyard_trainer.planning.checks import (
    check_batch,
    check_evaluation,
    check_rates,
    check_spec,
    check_warmup,
    reserved_bytes,
    slots_of,
)
from shardyard_trainer.planning.copies import plan_copy
from shardyard_trainer.planning.deepspeed_config import deepspeed_config
from shardyard_trainer.planning.duration import plan_time
from shardyard_trainer.planning.evaluation import plan_evaluation
from shardyard_trainer.planning.extraction import plan_extraction
from shardyard_trainer.planning.formats import check_policy, plan_format
from shardyard_trainer.planning.identity import data_fingerprint
from shardyard_trainer.planning.notices import plan_warnings, teacher_warnings
from shardyard_trainer.planning.pins import model_fingerprint, teacher_fingerprint, tokenizer_fingerprint
from shardyard_trainer.planning.seen import Seen, identities, look, may_move
from shardyard_trainer.planning.sizing import size_up
from shardyard_trainer.planning.statistics import data_stats, shared_warnings
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Output, Prepared, Task

_CLOSE = (plan_pb2.MEMORY_VERDICT_NO_FIT, plan_pb2.MEMORY_VERDICT_TIGHT)

_WITHOUT_TRAINING = {
    Output.DATASET: plan_extraction,
    Output.METRICS: plan_evaluation,
    Output.FORMAT: plan_format,
    Output.COPY: plan_copy,
}
"""Planners of jobs that train no model."""

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


def plan(request: bytes) -> bytes:
    """Plans a job: PlanRequest → PlanResult."""
    call = worker_pb2.PlanRequest.FromString(request)
    try:
        check_storage(call.locations)
        if may_move(call.spec):
            result = _with_etag(_plan(call))
        else:
            result = _remembered(call.SerializeToString(deterministic=True), tuple(identities(call)))
    except RunFailed as failed:
        result = _refused([SpecError("spec", failed.cause, f"{failed.message}; {failed.next_step}")])
    except OSError as error:  # It may succeed later.
        full = storage_failure(error, "the cache of plans")
        if full is None:
            raise
        result = _refused([SpecError("spec", full.cause, f"{full.message}; {full.next_step}")])
    except MemoryError:  # As above.
        raise
    except Exception as error:  # The edge: unforeseen files and settings fail the same way each time.
        _log.exception("a spec cannot be planned")
        what = f"{type(error).__name__}: {str(error)[:500]}".encode("utf-8", "backslashreplace").decode()
        text = f"it cannot be planned: {what}; leave out what is unusual in it"
        result = _refused([SpecError("spec", "SPEC_INVALID", text)])
    return result.SerializeToString()


@lru_cache(maxsize=256)
def _remembered(request: bytes, _identity: tuple[object, ...]) -> worker_pb2.PlanResult:
    return _with_etag(_plan(worker_pb2.PlanRequest.FromString(request)))


def _with_etag(result: worker_pb2.PlanResult) -> worker_pb2.PlanResult:
    """Identifies what would run: of the plan all but what only tells of the memory, and its words."""
    if result.HasField("plan"):
        kept = plan_pb2.JobPlan()
        kept.CopyFrom(result.plan)
        for name in ("memory", "decisions", "alternatives", "time", "warnings"):
            kept.ClearField(name)
        result.plan.etag = hashlib.sha256(kept.SerializeToString(deterministic=True)).hexdigest()[:32]
    return result


def _plan(call: worker_pb2.PlanRequest) -> worker_pb2.PlanResult:
    spec = spec_pb2.JobSpec()
    spec.CopyFrom(call.spec)
    task = _task_of(spec)
    make_plan = _WITHOUT_TRAINING.get(task.output) if task is not None else None
    resolve.fill_resources(spec, call.node_shape, trains=make_plan is None)
    errors = check_spec(spec, call.node_shape, task)
    if make_plan is not None:
        found = _try(errors, lambda: make_plan(spec, call.locations, call.node_shape))
        return worker_pb2.PlanResult(plan=found) if not errors else _refused(errors)
    seen = _try(errors, lambda: look(spec, call))
    if seen is not None:
        errors.extend(seen.weight_errors)
    if seen is None or errors:
        errors.extend(_batch_errors(spec))
        return _refused(errors)
    planned = _try(errors, lambda: _plan_training(spec, seen, call))
    return worker_pb2.PlanResult(plan=planned) if not errors else _refused(errors)


def _task_of(spec: spec_pb2.JobSpec) -> Task | None:
    """The task; None if none is given, which is reported with all other errors."""
    try:
        return table.of(spec)
    except SpecError:
        return None


def _plan_training(spec: spec_pb2.JobSpec, seen: Seen, call: worker_pb2.PlanRequest) -> plan_pb2.JobPlan | None:
    task = seen.task
    resolve.fill_optimization(spec, task)
    resolve.fill_adaptation(spec.fine_tuning)
    optimization = spec.optimization
    raise_all([*check_rates(optimization), *check_batch(optimization, task), *check_evaluation(spec.evaluation, task)])
    check_policy(spec, task)
    resolve.fill_task(spec, task)
    resolve.fill_distillation(spec, seen.lesson)
    for source, field in ((spec.train_data, "spec.train_data"), (spec.eval_data, "spec.eval_data")):
        if source.WhichOneof("source"):
            resolve.fill_source(source, resolve_source(source, call.locations, field=field))
    shape = seen.shape
    sized = size_up(spec, task, seen.lesson, shape, call.node_shape)
    need, batch, steps, ways, gang = sized.need, sized.batch, sized.steps, sized.placed.ways, sized.gang
    raise_all(check_warmup(optimization, steps))
    others = list(alternatives(spec, seen, sized, call.node_shape)) if need.verdict in _CLOSE else []
    resolve.fill_batch(spec, batch, ways, evaluate_every=evaluation_steps(task, batch, steps))
    config = deepspeed_config(
        zero_stage=ways.stage,
        clip=optimization.clip,
        precision="bf16" if gang.bf16 else "fp32",
        micro_batch_size=batch.micro_batch_size,
        workers=batch.workers,
        on_gpu=gang.on_gpu,
        offload=ways.offloads,
    )
    checkpoint = checkpoint_bytes(shape, stage=ways.stage, bf16=gang.bf16)
    train_stats, eval_stats = task.train.stats(), task.eval.stats() if task.eval is not None else None
    losses = _loss_warnings(spec, task, {"training": train_stats, "evaluation": eval_stats})
    return plan_pb2.JobPlan(
        resolved_spec=spec,
        batch=_batch_proto(batch),
        deepspeed_config_json=json.dumps(config, sort_keys=True),
        num_parameters=shape.num_parameters,
        num_trainable_parameters=shape.num_trainable,
        num_teacher_parameters=shape.teacher.num_parameters if shape.teacher is not None else 0,
        memory=need.to_proto(reserved_bytes(spec, call.node_shape)),
        total_steps=steps,
        num_train_samples=task.train.num_samples,
        num_eval_samples=task.eval.num_samples if task.eval is not None else 0,
        num_train_tokens=task.train.num_tokens,
        labels=list(task.describe().get("labels") or ()),
        checkpoint_bytes=checkpoint,
        warnings=[
            *does_not_fit(spec, need, shape.num_parameters, ways.stage, others),
            *plan_warnings(spec, task, need, steps, call.node_shape),
            *teacher_warnings(seen.lesson, task),
            *losses,
            *shared_warnings(spec, task, seen.num_shared),
        ],
        slots=slots_of(spec),
        data_fingerprint=data_fingerprint(spec, call.locations),
        model_fingerprint=model_fingerprint(spec, call.locations),
        tokenizer_fingerprint=tokenizer_fingerprint(spec, call.locations),
        teacher_fingerprint=teacher_fingerprint(spec, call.locations),
        decisions=sized.placed.decisions,
        alternatives=others,
        time=plan_time(spec, task, shape, sized, call.node_shape, checkpoint=checkpoint),
        train_stats=data_stats(task, task.train),
        eval_stats=data_stats(task, task.eval) if task.eval is not None else None,
        num_shared_samples=seen.num_shared,
        output=task.task.output.value,
        metrics=list(_metrics(task)),
    )


def evaluation_steps(task: Prepared, batch: Batch, steps: int) -> int | None:
    """Steps between two evaluations if the spec does not say; None: nothing is evaluated."""
    if task.eval is None:
        return None
    return evaluation_interval(
        steps, num_train_samples=task.train.num_samples, global_batch_size=batch.global_batch_size
    )


def _loss_warnings(
    spec: spec_pb2.JobSpec, task: Prepared, stats: Mapping[str, DataStats | None]
) -> Iterator[job_pb2.Warning]:
    """The warnings about text that the model would not see, of the training and the evaluation data."""
    place = f"{table.path_of(spec)}.max_length"
    for of, found in stats.items():
        if found is not None:
            yield from loss_warnings(found, of=of, length=task.length, field=place)


def _metrics(task: Prepared) -> Iterator[plan_pb2.EvaluationMetric]:
    if task.eval is not None:
        for name, direction in task.metrics().directions().items():
            yield plan_pb2.EvaluationMetric(name=name, higher_is_better=direction > 0)


def _batch_errors(spec: spec_pb2.JobSpec) -> Iterator[SpecError]:
    """The errors of the batch, if model or data cannot be used."""
    optimization = spec.optimization
    size = optimization.global_batch_size if optimization.HasField("global_batch_size") else resolve.GLOBAL_BATCH_SIZE
    given = optimization.micro_batch_size if optimization.HasField("micro_batch_size") else None
    if min(size, spec.resources.workers, given if given is not None else 1) < 1:
        return
    try:
        plan_batch(size, spec.resources.workers, micro_batch_size=given, most_at_once=1)
    except BatchRefused as error:
        yield SpecError(f"spec.{error.field}", error.reason, str(error))


def checkpoint_bytes(shape: memory.Shape, *, stage: int, bf16: bool) -> int:
    """The weights, and of those that are trained AdamW's two moments and from stage 1 on fp32 master weights."""
    return shape.num_parameters * (2 if bf16 else 4) + shape.num_trainable * (12 if stage else 8)


def _batch_proto(batch: Batch) -> plan_pb2.BatchPlan:
    return plan_pb2.BatchPlan(
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        accumulation_steps=batch.accumulation_steps,
        workers=batch.workers,
        samples_per_rank=batch.samples_per_rank,
    )


def _try(errors: list[SpecError], look: Callable[[], _T]) -> _T | None:
    try:
        return look()
    except SpecError as error:
        errors.extend(error.all())
        return None


def _refused(errors: list[SpecError]) -> worker_pb2.PlanResult:
    return worker_pb2.PlanResult(
        violations=[
            worker_pb2.Violation(field=error.field, reason=error.reason, message=error.message, metadata=error.metadata)
            for error in errors
        ]
    )
