"""How long a job takes, from its operations, before anything has run: a rough number with an honest interval.

The canary and the steps then measure: `Progress.eta` is from these. docs/planning.md has the formulas and their errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import Samples
from shardyard_trainer.planning.checks import slots_of
from shardyard_trainer.planning.memory import Shape
from shardyard_trainer.planning.sizing import Sized
from shardyard_trainer.tasks.base import Prepared

FLOPS_OF_CORE = 50e9
"""Of one CPU core in fp32: 42e9 to 72e9 were measured in training (docs/benchmarks.md)."""

FLOPS_OF_GPUS: Mapping[str, float] = {
    "H200": 989e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12,
    "A40": 150e12, "A10": 125e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 15.7e12, "T4": 8.1e12,
}  # fmt: skip
"""Their makers' dense figures in bf16, in fp32 for those that do not compute it."""

OTHER_GPU = 100e12
USED_OF_GPU = 0.3
USED_IN_FP32 = 0.08
"""The part of these figures that a training reaches; in fp32 the units for bf16 rest."""

START_S, COLD_START_S = 5.0, 20.0
"""From the start of the ranks to the first step, and the canary. On CPUs ranks are forks of a process that has imported
everything; with GPUs they import it themselves, and start CUDA and NCCL.
"""

DISK_BYTES_S = 500e6
BYTES_S_BETWEEN = {True: 50e9, False: 1e9}
"""What workers of a gang send each other: between GPUs, and through loopback."""

WITHIN, WITHIN_OF_OTHER_GPU = 2.0, 5.0
"""The interval: this factor below and above."""

GENERATED = 20.0
"""How much more an evaluation computes that writes texts."""


def plan_time(
    spec: spec_pb2.JobSpec, task: Prepared, shape: Shape, sized: Sized, node: worker_pb2.NodeShape, *, checkpoint: int
) -> plan_pb2.TimePlan:
    """The time from the start of the gang to its end; `checkpoint` are the bytes of one."""
    workers, rate = sized.gang.workers, _rate(spec, node)
    sample, attended = _positions(task, task.train)
    recomputes = sized.placed.ways.recomputes
    step = sample * sized.batch.global_batch_size * _step_flops(shape, attended, recomputes) / (rate * workers)
    step += _between(shape, sized)
    evaluation = 0.0
    if task.eval is not None:
        positions, attended = _positions(task, task.eval)
        computed = positions * task.eval.num_samples * _forward_flops(shape, attended)
        evaluation = computed * (GENERATED if task.metrics().write is not None else 1.0) / (rate * workers)
    times = max(sized.steps // max(spec.evaluation.every, 1), 1)
    saved = 2 + min(sized.steps * step // 60, 10)
    export = 4 * shape.num_parameters
    start_s = COLD_START_S if sized.gang.on_gpu else START_S
    expected = start_s + sized.steps * step + times * evaluation + (saved * checkpoint + 3 * export) / DISK_BYTES_S
    factor = WITHIN if not sized.gang.on_gpu or _known(node) else WITHIN_OF_OTHER_GPU
    found = plan_pb2.TimePlan(slot_hours=expected * slots_of(spec) / 3600, worker_hours=expected * workers / 3600)
    for name, seconds in (("expected", expected), ("low", expected / factor), ("high", expected * factor)):
        getattr(found, name).FromMilliseconds(round(seconds * 1000))
    return found


def reading_s(spec: spec_pb2.JobSpec, shape: Shape, length: int, node: worker_pb2.NodeShape) -> float:
    """Seconds in which one worker computes one input of `length` positions, without writing an answer."""
    return length * _forward_flops(shape, length) / _rate(spec, node)


def _positions(task: Prepared, samples: Samples) -> tuple[float, float]:
    """Positions of a sample, on average over the samples, and of the sample that a position is in, over the positions.

    A batch has samples of similar lengths, so padding is left out.
    """
    lengths = samples.lengths()
    if lengths is None or not len(lengths):
        return float(task.length), float(task.length)
    counts = lengths.astype(np.float64)
    return float(counts.mean()), float(np.square(counts).sum() / max(counts.sum(), 1.0))


def _step_flops(shape: Shape, length: float, recomputes: bool) -> float:
    """Operations for one position: forward, and backward towards the inputs and the weights that are trained."""
    forward = _forward_flops(shape, length)
    trained = shape.num_trainable / max(shape.num_parameters, 1)
    above = 1 - shape.num_frozen_layers / max(shape.num_layers, 1)
    total = forward * (1 + above + above * trained)
    if recomputes:
        total += forward * above
    if shape.teacher is not None:
        total += _forward_flops(shape.teacher, length)
    return total


def _forward_flops(shape: Shape, length: float) -> float:
    """Operations of a forward pass for one of `length` positions that attend to one another."""
    attention = 0.0 if shape.is_attention_counted else 4 * shape.width * shape.num_layers * length
    return shape.forward_flops + attention


def _between(shape: Shape, sized: Sized) -> float:
    """Seconds of a step in which gradients, and at stage 3 weights, go between workers."""
    workers = sized.gang.workers
    size = 2 if sized.gang.bf16 else 4
    sent = 2 * size * shape.num_trainable
    if sized.placed.ways.stage == 3:
        sent += 2 * size * shape.num_parameters * sized.batch.accumulation_steps
    return sent * (workers - 1) / workers / BYTES_S_BETWEEN[sized.gang.on_gpu]


def _rate(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> float:
    """Operations that a worker computes in a second."""
    resources = spec.resources
    if not resources.gpus_per_worker:
        return FLOPS_OF_CORE * max(resources.cpus_per_worker, 1)
    figure = _known(node) or OTHER_GPU
    in_halves = spec.optimization.precision == spec_pb2.PRECISION_BF16
    used = USED_OF_GPU if in_halves or not node.bf16 else USED_IN_FP32
    return figure * used


def _known(node: worker_pb2.NodeShape) -> float:
    """The figure of the node's GPUs, by the longest name that theirs has; 0: not listed."""
    names = sorted((name for name in FLOPS_OF_GPUS if name in node.gpu_name), key=len)
    return FLOPS_OF_GPUS[names[-1]] if names else 0.0
