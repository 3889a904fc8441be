"""Warnings about a valid plan (docs/planning.md lists the reasons)."""

from __future__ import annotations

from collections.abc import Iterator

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.memory import Memory
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.distillation import FIELD, Lesson


def plan_warnings(
    spec: spec_pb2.JobSpec, task: Prepared, need: Memory, steps: int, node: worker_pb2.NodeShape
) -> Iterator[job_pb2.Warning]:
    """Each with the field that it is about; `steps` is the length of the run, `node` what the job may get."""
    optimization = spec.optimization
    for reason, message, field in task.warnings:
        yield job_pb2.Warning(reason=reason, message=message, field=field)
    rate = "spec.optimization.learning_rate"
    if optimization.learning_rate == 0:
        yield job_pb2.Warning(reason="LEARNING_RATE_ZERO", message="at 0 nothing is learned", field=rate)
    elif optimization.learning_rate > 1:
        message = f"{optimization.learning_rate:g} is far over what AdamW can use (1e-5 to 1e-2)"
        yield job_pb2.Warning(reason="LEARNING_RATE_HIGH", message=message, field=rate)
    if optimization.WhichOneof("warmup") == "warmup_steps" and optimization.warmup_steps == steps:
        message = f"all of {steps} steps: the learning rate never gets to its height"
        yield job_pb2.Warning(reason="WARMUP_TOO_LONG", message=message, field="spec.optimization.warmup_steps")
    if optimization.global_batch_size > task.train.num_samples:
        message = f"{optimization.global_batch_size} is more than the {task.train.num_samples} samples there are"
        yield job_pb2.Warning(reason="BATCH_OVER_DATA", message=message, field="spec.optimization.global_batch_size")
    if task.choice.is_fresh and (spec.fine_tuning.HasField("lora") or spec.fine_tuning.HasField("freeze")):
        message = "the model is new: what is frozen of it stays as it was drawn at random; start from a trained model"
        yield job_pb2.Warning(reason="FROZEN_AT_RANDOM", message=message, field="spec.model")
    evaluation = spec.evaluation
    if evaluation.HasField("early_stopping") and evaluation.every * (evaluation.early_stopping.patience + 1) >= steps:
        patience = evaluation.early_stopping.patience
        message = (
            f"{steps} steps with an evaluation every {evaluation.every} are too few for a patience of {patience}: "
            "training never ends early; evaluate more often, or use less patience"
        )
        yield job_pb2.Warning(reason="NEVER_STOPS_EARLY", message=message, field="spec.evaluation.early_stopping")
    if need.verdict == plan_pb2.MEMORY_VERDICT_TIGHT:
        message = (
            f"{need.total:,} bytes of {need.available:,} by formula: it may not fit; "
            "a smaller micro_batch_size or a higher zero_stage needs less"
        )
        yield job_pb2.Warning(reason="MEMORY_TIGHT", message=message, field="spec.resources")
    if spec.resources.gpus_per_worker and optimization.precision == spec_pb2.PRECISION_FP32 and not node.bf16:
        gpus = f"the GPUs ({node.gpu_name}) do not compute bf16" if node.gpu_name else "what the GPUs are is not known"
        message = f"{gpus}, so fp32 is used, with twice the memory; if they do support bf16, set precision to bf16"
        yield job_pb2.Warning(reason="PRECISION_FP32", message=message, field="spec.optimization.precision")
    if spec.parallelism.compile and not spec.resources.gpus_per_worker:
        message = "on a CPU it costs 11 to 25 s of start-up, needs a C++ compiler, and is rarely faster"
        yield job_pb2.Warning(reason="COMPILE_ON_CPU", message=message, field="spec.parallelism.compile")


def teacher_warnings(lesson: Lesson | None, task: Prepared) -> Iterator[job_pb2.Warning]:
    """What was found about the teacher itself, and whether it reads less of long texts than the model."""
    if lesson is None:
        return
    for reason, message, field in lesson.task.warnings:
        if field.startswith(FIELD):
            yield job_pb2.Warning(reason=reason, message=f"the teacher: {message}", field=field)
    mine, its = task.train.stats(), lesson.task.train.stats()
    if its.num_cut > mine.num_cut:
        message = (
            f"the teacher reads at most {lesson.task.length:,} tokens: of {its.num_samples:,} texts {its.num_cut:,} "
            f"are cut for it, and {mine.num_cut:,} for the model; take one that reads longer texts if the ends matter"
        )
        yield job_pb2.Warning(reason="TEXTS_CUT", message=message, field=FIELD)
