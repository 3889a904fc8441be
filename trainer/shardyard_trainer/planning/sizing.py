"""How a job is cut to its workers: where states are kept, micro batches, steps, and the memory that it all takes."""

from __future__ import annotations

from typing import NamedTuple

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning import memory
from shardyard_trainer.planning.arithmetic import Batch, BatchRefused, plan_batch, total_steps
from shardyard_trainer.planning.checks import node_memory_of_worker
from shardyard_trainer.planning.placement import Placement, place
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.distillation import Lesson

CPU_POSITIONS_AT_ONCE = 8192
"""Token positions of a micro batch on a CPU: more is not faster there, and costs memory."""

GPU_POSITIONS_AT_ONCE = 65536


class Sized(NamedTuple):
    """The size of a job; `length` are the positions of its longest sample, `batches` the bytes of samples held."""

    gang: memory.Gang
    placed: Placement
    batch: Batch
    steps: int
    need: memory.Memory
    length: int
    batches: int


def size_up(
    spec: spec_pb2.JobSpec, task: Prepared, lesson: Lesson | None, shape: memory.Shape, node: worker_pb2.NodeShape
) -> Sized:
    """The size of a resolved spec. Raises SpecError for what cannot be, but not for states that do not fit."""
    gang = gang_of(spec, node)
    length, node_bytes = longest_sample(task), node_memory_of_worker(spec, node)
    kind = task.choice.config.model_type
    placed = place(spec.parallelism, shape, gang, length=length, node_bytes=node_bytes, kind=kind)
    at_once = _positions_at_once(shape, gang, placed.ways) // length
    batch, steps = _batch_and_steps(spec, task, most_at_once=at_once)
    batches = _batches_bytes(task, lesson, batch, node_bytes=node_bytes)
    positions = batch.micro_batch_size * length
    need = memory.estimate(shape, gang, placed.ways, positions=positions, batches=batches)
    return Sized(gang, placed, batch, steps, need, length, batches)


def gang_of(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> memory.Gang:
    """The workers as the memory formulas see them."""
    return memory.Gang(
        workers=spec.resources.workers,
        bf16=spec.optimization.precision == spec_pb2.PRECISION_BF16,
        on_gpu=spec.resources.gpus_per_worker > 0,
        available=memory_of_worker(spec, node),
    )


def _positions_at_once(shape: memory.Shape, gang: memory.Gang, ways: memory.Ways) -> int:
    most = GPU_POSITIONS_AT_ONCE if gang.on_gpu else CPU_POSITIONS_AT_ONCE
    fitting = memory.positions_that_fit(shape, gang, ways)
    return most if fitting is None else min(most, fitting)


def memory_of_worker(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> int:
    """Bytes that one worker computes in: its GPU's, or its share of the node's; 0: not known."""
    return node.gpu_memory_bytes if spec.resources.gpus_per_worker else node_memory_of_worker(spec, node)


def _batches_bytes(task: Prepared, lesson: Lesson | None, batch: Batch, *, node_bytes: int) -> int:
    """Bytes of samples that a rank holds. Raises SpecError if a worker's part of the node is smaller."""
    lengths = task.train.lengths()
    longest = 0 if lengths is None else int(lengths.argmax())
    read = [task] if lesson is None else [task, lesson.task]
    samples = [each.train.micro_batch([SampleRef(0, longest)]) for each in read]
    size = float(sum(tensor.nbytes for sample in samples for tensor in sample.inputs.values()))
    if lengths is not None:
        size *= float(lengths.mean()) / max(int(lengths[longest]), 1)
    need = memory.batches_bytes(global_batch_size=batch.global_batch_size, workers=batch.workers, sample_bytes=size)
    if node_bytes and need > node_bytes:
        most = max(batch.global_batch_size * node_bytes // (2 * need), 1)
        raise SpecError(
            "spec.optimization.global_batch_size",
            "MODEL_DOES_NOT_FIT",
            f"{batch.global_batch_size:,} samples a step take {need:,} bytes on each of {batch.workers} workers, but a "
            f"worker has {node_bytes:,}; {most:,} samples would take half of that",
            {"batches_bytes": str(need), "available_bytes": str(node_bytes)},
        )
    return need


def _batch_and_steps(spec: spec_pb2.JobSpec, task: Prepared, *, most_at_once: int) -> tuple[Batch, int]:
    optimization = spec.optimization
    given = optimization.micro_batch_size if optimization.HasField("micro_batch_size") else None
    kind = optimization.WhichOneof("duration")
    try:
        batch = plan_batch(
            optimization.global_batch_size,
            spec.resources.workers,
            micro_batch_size=given,
            most_at_once=max(most_at_once, 1),
        )
        steps = total_steps(
            max_steps=optimization.max_steps if kind == "max_steps" else None,
            epochs=optimization.epochs if kind == "epochs" else None,
            num_samples=task.train.num_samples,
            global_batch_size=optimization.global_batch_size,
        )
    except BatchRefused as error:
        raise SpecError(f"spec.{error.field}", error.reason, str(error)) from error
    return batch, steps


def longest_sample(task: Prepared) -> int:
    """Positions of the longest training sample."""
    lengths = task.train.lengths()
    return task.length if lengths is None or not len(lengths) else max(int(lengths.max()), 1)
