"""The errors of a spec that do not depend on model and data: precision, resources, parts that conflict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, listed, nearest, shorten
from shardyard_trainer.tasks.base import Output, Prepared, Task

_TRAINING_ONLY = (
    "train_data",
    "eval_data",
    "tokenizer",
    "checkpoints",
    "evaluation",
    "parallelism",
    "distillation",
    "export",
)

_WITHOUT_TRAINING: Mapping[Output, tuple[str, ...]] = {
    Output.DATASET: (),
    Output.METRICS: ("micro_batch_size", "precision", "seed"),
    Output.FORMAT: ("micro_batch_size", "seed"),
    Output.COPY: (),
}
"""Of `optimization`, what is followed by tasks that train nothing."""

_LONGEST_RUN_S = 10 * 366 * 86400


def check_spec(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape, task: Task | None) -> list[SpecError]:
    """All that is wrong; `spec` has its resources and precision filled in."""
    errors = [*_check_resources(spec, node), *_check_precision(spec, node)]
    if spec.resources.workers < 1 or spec.resources.cpus_per_worker < 1:
        errors.append(SpecError("spec.resources", "SPEC_INVALID", "workers and cpus_per_worker must be at least 1"))
    duration = spec.max_run_time
    if spec.HasField("max_run_time") and not _is_run_time(duration.seconds, duration.nanos):
        message = f"{duration.seconds} s and {duration.nanos} ns: more than 0 and at most 10 years"
        errors.append(SpecError("spec.max_run_time", "SPEC_INVALID", message))
    if task is not None and task.output is not Output.MODEL:
        return [*errors, *_check_training_only(spec, task)]
    return [*errors, *_check_optimization(spec.optimization)]


def _check_training_only(spec: spec_pb2.JobSpec, task: Task) -> Iterator[SpecError]:
    """Settings of a training, given to a task that trains nothing."""
    what = task.name.replace("_", " ")
    for name in _TRAINING_ONLY:
        if spec.HasField(name):  # type: ignore[arg-type]
            yield SpecError(f"spec.{name}", "SPEC_INVALID", f"{what} has none; leave it out")
    for field, _ in spec.optimization.ListFields():
        takes = _WITHOUT_TRAINING[task.output]
        # The precision is filled in for every job.
        if field.name not in {*takes, "precision"}:
            message = (
                f"{what} trains nothing, and takes {f'only {listed(takes)}' if takes else 'none'} here; leave it out"
            )
            yield SpecError(f"spec.optimization.{field.name}", "SPEC_INVALID", message)


def _is_run_time(seconds: int, nanos: int) -> bool:
    return 0 <= seconds <= _LONGEST_RUN_S and 0 <= nanos < 10**9 and seconds + nanos > 0


def slots_of(spec: spec_pb2.JobSpec) -> int:
    """Slots that the gang holds: a GPU is one, and without GPUs a core."""
    resources = spec.resources
    return resources.workers * (resources.gpus_per_worker or resources.cpus_per_worker)


def node_memory_of_worker(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> int:
    """A worker's share of a node with as many workers as fit, beside the service's own processes; 0: not known."""
    resources = spec.resources
    there, of_worker = (
        (node.gpus, resources.gpus_per_worker) if resources.gpus_per_worker else (node.cpus, resources.cpus_per_worker)
    )
    on_node = max(1, there // max(of_worker, 1)) if there else resources.workers
    left = max(node.memory_bytes - node.reserved_bytes, 0) // max(1, min(resources.workers, on_node))
    # A machine that the service fills is not one whose memory is not known.
    return max(left, 1) if node.memory_bytes else 0


def reserved_bytes(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> int:
    """What the service's own processes take of the memory in which the workers compute."""
    return 0 if spec.resources.gpus_per_worker else node.reserved_bytes


def _check_resources(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> Iterator[SpecError]:
    resources = spec.resources
    for name, wanted, there, what in (
        ("gpus_per_worker", resources.gpus_per_worker, node.gpus, "GPUs"),
        ("cpus_per_worker", resources.cpus_per_worker, node.cpus, "CPU cores"),
    ):
        if node.cpus and wanted > there:
            yield SpecError(
                f"spec.resources.{name}",
                "TOO_LARGE_FOR_CLUSTER",
                f"{wanted} {what} for one worker, but the largest node has {there}; ask for at most {there}",
                {"largest": str(there)},
            )


def _check_precision(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> Iterator[SpecError]:
    precision, field = spec.optimization.precision, "spec.optimization.precision"
    on_gpu = spec.resources.gpus_per_worker > 0
    # If a GPU's properties could not be read, the user's setting is accepted.
    has_bf16 = node.bf16 or not node.gpu_name
    supported = {"supported": "fp32, bf16" if on_gpu and has_bf16 else "fp32"}
    if precision == spec_pb2.PRECISION_FP16:
        message = "fp16 is not trained with here: its narrow range needs loss scaling; use bf16 on GPUs, fp32 on CPUs"
        yield SpecError(field, "PRECISION_UNSUPPORTED", message, supported)
    elif precision == spec_pb2.PRECISION_BF16 and not on_gpu:
        message = "bf16 on a CPU is up to 15 times slower than fp32; use fp32, or gpus_per_worker"
        yield SpecError(field, "PRECISION_UNSUPPORTED", message, supported)
    elif precision == spec_pb2.PRECISION_BF16 and not has_bf16:
        message = f"the cluster's GPUs ({node.gpu_name}) do not compute bf16; use fp32, or leave precision out"
        yield SpecError(field, "PRECISION_UNSUPPORTED", message, supported)
    parallelism = spec.parallelism
    if precision == spec_pb2.PRECISION_BF16 and parallelism.HasField("zero_stage") and parallelism.zero_stage == 0:
        message = "DeepSpeed's stage 0 trains bf16 wrongly (its first update is 0.74 of what it should be); use stage 1"
        yield SpecError("spec.parallelism.zero_stage", "PRECISION_UNSUPPORTED", message, {"supported": "1, 2, 3"})


def _check_optimization(optimization: spec_pb2.Optimization) -> Iterator[SpecError]:
    field = "spec.optimization"
    kind = optimization.WhichOneof("duration")
    if kind is None:
        yield SpecError(field, "SPEC_INVALID", "no duration: give max_steps or epochs")
    elif kind == "epochs" and not (math.isfinite(optimization.epochs) and optimization.epochs > 0):
        yield SpecError(f"{field}.epochs", "SPEC_INVALID", f"{optimization.epochs:g} must be finite and over 0")
    elif kind == "max_steps" and optimization.max_steps < 1:
        yield SpecError(f"{field}.max_steps", "SPEC_INVALID", f"{optimization.max_steps} must be at least 1")
    for name in ("global_batch_size", "micro_batch_size"):
        if optimization.HasField(name) and getattr(optimization, name) < 1:
            yield SpecError(f"{field}.{name}", "SPEC_INVALID", f"{getattr(optimization, name)} must be at least 1")
    if optimization.HasField("learning_rate"):
        yield from check_rates(optimization)


def check_rates(optimization: spec_pb2.Optimization) -> Iterator[SpecError]:
    """That the schedule does not end over its height, the learning rate being known."""
    if optimization.min_learning_rate > optimization.learning_rate:
        yield SpecError(
            "spec.optimization.min_learning_rate",
            "SPEC_INVALID",
            f"{optimization.min_learning_rate:g} is more than the learning_rate of {optimization.learning_rate:g}",
        )


def check_batch(optimization: spec_pb2.Optimization, task: Prepared) -> Iterator[SpecError]:
    """That a step has as many samples as the task needs to learn from them."""
    if optimization.global_batch_size < task.smallest_batch:
        message = (
            f"{optimization.global_batch_size}: this {task.task.name} learns from the other samples of a batch; "
            f"give at least {task.smallest_batch}"
        )
        yield SpecError("spec.optimization.global_batch_size", "SPEC_INVALID", message)


def check_evaluation(evaluation: spec_pb2.EvaluationPolicy, task: Prepared) -> Iterator[SpecError]:
    """That there is what evaluations are to be compared by."""
    field = "spec.evaluation"
    if task.eval is None:
        for name, is_set in (
            ("metric", evaluation.metric),
            ("select_best", evaluation.select_best),
            ("early_stopping", evaluation.HasField("early_stopping")),
        ):
            if is_set:
                message = "there is no data to evaluate on; give eval_data, or an evaluation.holdout over 0"
                yield SpecError(f"{field}.{name}", "SPEC_INVALID", message)
        return
    known = task.metrics().directions()
    if evaluation.metric and evaluation.metric not in known:
        message = (
            f"{shorten(evaluation.metric)!r} is not a metric of this {task.task.name}, which has {', '.join(known)}"
            f"{nearest(evaluation.metric, known)}"
        )
        yield SpecError(f"{field}.metric", "SPEC_INVALID", message, {"supported": ", ".join(known)})


def check_warmup(optimization: spec_pb2.Optimization, steps: int) -> Iterator[SpecError]:
    """That the learning rate gets to its height within the run."""
    if optimization.WhichOneof("warmup") == "warmup_steps" and optimization.warmup_steps > steps:
        yield SpecError(
            "spec.optimization.warmup_steps",
            "SPEC_INVALID",
            f"{optimization.warmup_steps:,} steps of warm-up, but the run has {steps:,}: the learning rate never gets "
            "to its height; use fewer, a warmup_ratio (0.1 is the default), or a longer run",
        )
