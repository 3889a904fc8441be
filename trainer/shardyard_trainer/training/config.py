"""The numbers of a run, read once from the resolved spec and its plan: loop and engine read these, not the spec."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.arithmetic import DEFAULT_METRIC, DEFAULT_PATIENCE, evaluation_interval, total_steps
from shardyard_trainer.training.schedule import Schedule
from shardyard_trainer.training.selection import SelectionPolicy

_SCHEDULES = {
    spec_pb2.SCHEDULE_UNSPECIFIED: "linear",
    spec_pb2.SCHEDULE_LINEAR: "linear",
    spec_pb2.SCHEDULE_COSINE: "cosine",
    spec_pb2.SCHEDULE_CONSTANT: "constant",
}
_PRECISIONS = {spec_pb2.PRECISION_FP32: "fp32", spec_pb2.PRECISION_BF16: "bf16"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything the loop and the engine need to know; `every` of 0: chosen by the loop."""

    total_steps: int
    batch_size: int
    micro_batch_size: int
    seed: int
    schedule: Schedule
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    precision: str
    zero_stage: int
    compile: bool
    offload: bool
    gpus_per_worker: int
    checkpoint_every: int
    checkpoint_bytes: int
    evaluate_every: int
    log_interval_s: float
    selection: SelectionPolicy


def resolved_spec(attempt: worker_pb2.AttemptSpec) -> spec_pb2.JobSpec:
    """The spec with everything filled in; as submitted if there is no plan."""
    return attempt.plan.resolved_spec if attempt.plan.HasField("resolved_spec") else attempt.spec


def train_config(attempt: worker_pb2.AttemptSpec, *, num_train_samples: int) -> TrainConfig:
    """Reads a resolved spec. What a plan would have filled in but did not gets the value that spec.proto documents.

    Raises: ValueError if the spec names no duration, or the plan belongs to other data.
    """
    spec = resolved_spec(attempt)
    opt = spec.optimization
    batch_size = opt.global_batch_size if opt.HasField("global_batch_size") else 32
    steps = _total_steps(opt, batch_size, num_train_samples)
    workers = max(attempt.world_size, 1)
    share = -(-batch_size // workers)
    on_gpu = spec.resources.gpus_per_worker > 0
    planned = attempt.plan.batch.micro_batch_size or (
        opt.micro_batch_size if opt.HasField("micro_batch_size") else min(share, 32)
    )
    return TrainConfig(
        total_steps=steps,
        batch_size=batch_size,
        micro_batch_size=min(planned, share),
        seed=opt.seed,
        schedule=Schedule(
            kind=_SCHEDULES[opt.schedule],
            peak=opt.learning_rate if opt.HasField("learning_rate") else 5e-5,
            minimum=opt.min_learning_rate,
            warmup_steps=_warmup_steps(opt, steps),
            total_steps=steps,
        ),
        weight_decay=opt.weight_decay if opt.HasField("weight_decay") else 0.01,
        betas=(
            opt.beta1 if opt.HasField("beta1") else 0.9,
            opt.beta2 if opt.HasField("beta2") else 0.999,
        ),
        clip=opt.clip if opt.HasField("clip") else 1.0,
        precision=_PRECISIONS.get(opt.precision, "bf16" if on_gpu else "fp32"),
        zero_stage=_zero_stage(spec, workers, on_gpu),
        compile=spec.parallelism.compile,
        offload=spec.parallelism.offload_optimizer,
        gpus_per_worker=spec.resources.gpus_per_worker,
        checkpoint_every=spec.checkpoints.every,
        checkpoint_bytes=attempt.plan.checkpoint_bytes,
        evaluate_every=spec.evaluation.every
        or evaluation_interval(steps, num_train_samples=num_train_samples, global_batch_size=batch_size),
        log_interval_s=max(attempt.log_interval_s, 0.0) or 1.0,
        selection=_selection(spec.evaluation),
    )


def _selection(evaluation: spec_pb2.EvaluationPolicy) -> SelectionPolicy:
    stopping = evaluation.early_stopping
    patience = stopping.patience if stopping.HasField("patience") else DEFAULT_PATIENCE
    return SelectionPolicy(
        metric=evaluation.metric or DEFAULT_METRIC,
        select_best=evaluation.select_best,
        patience=patience if evaluation.HasField("early_stopping") else 0,
        min_delta=stopping.min_delta,
    )


def _total_steps(opt: spec_pb2.Optimization, batch_size: int, num_train_samples: int) -> int:
    kind = opt.WhichOneof("duration")
    if kind is None:
        raise ValueError("optimization.max_steps or optimization.epochs is required")
    return total_steps(
        max_steps=opt.max_steps if kind == "max_steps" else None,
        epochs=opt.epochs if kind == "epochs" else None,
        num_samples=num_train_samples,
        global_batch_size=batch_size,
    )


def _warmup_steps(opt: spec_pb2.Optimization, total_steps: int) -> int:
    if opt.WhichOneof("warmup") == "warmup_steps":
        return min(opt.warmup_steps, total_steps)
    ratio = opt.warmup_ratio if opt.WhichOneof("warmup") == "warmup_ratio" else 0.1
    return min(math.ceil(ratio * total_steps), total_steps)


def _zero_stage(spec: spec_pb2.JobSpec, workers: int, on_gpu: bool) -> int:
    if spec.parallelism.HasField("zero_stage"):
        return spec.parallelism.zero_stage
    return 1 if workers > 1 or on_gpu else 0
