"""What would fit, if a job does not or hardly does: settings that can be submitted, the cheapest first.

Each is tried like a spec of its own, model and all; only what then FITS is proposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.message import Message

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.planning.checks import reserved_bytes
from shardyard_trainer.planning.memory import Memory, estimate
from shardyard_trainer.planning.seen import PROPOSED_RANK, Seen
from shardyard_trainer.planning.sizing import Sized, size_up
from shardyard_trainer.tasks import table

MOST = 4
REFUSAL = "MODEL_DOES_NOT_FIT"
_SHORTEST = 16
_LENGTHS = ("max_length", "sequence_length")

Settings = Mapping[str, str]
"""Values of fields of a spec, as `--set` of the command line takes them."""


def alternatives(
    spec: spec_pb2.JobSpec, seen: Seen, sized: Sized, node: worker_pb2.NodeShape
) -> Iterator[plan_pb2.Alternative]:
    """At most four settings with which the job fits."""
    found = 0
    for settings in _candidates(spec, seen, sized, node):
        need = _need(spec, settings, seen, node)
        if need is None or need.verdict != plan_pb2.MEMORY_VERDICT_FITS:
            continue
        yield plan_pb2.Alternative(settings=dict(settings), memory=need.to_proto(reserved_bytes(spec, node)))
        found += 1
        if found == MOST:
            return


def does_not_fit(
    spec: spec_pb2.JobSpec, need: Memory, num_parameters: int, stage: int, others: Sequence[plan_pb2.Alternative]
) -> Iterator[job_pb2.Warning]:
    """Why a job is refused, if its states exceed a worker's memory, and what would fit."""
    if need.verdict != plan_pb2.MEMORY_VERDICT_NO_FIT:
        return
    proposed = [" ".join(f"{path}={value}" for path, value in sorted(each.settings.items())) for each in others]
    step = (
        f"these would fit: {'; '.join(proposed)}" if proposed else "use more workers on more nodes, or a smaller model"
    )
    message = (
        f"{num_parameters:,} parameters need {need.states:,} bytes of states on each of {spec.resources.workers} "
        f"workers at ZeRO stage {stage}, but a worker has {need.available:,}; {step}"
    )
    yield job_pb2.Warning(reason=REFUSAL, message=message, field="spec.model")


def _candidates(spec: spec_pb2.JobSpec, seen: Seen, sized: Sized, node: worker_pb2.NodeShape) -> Iterator[Settings]:
    """What may help: each setting alone, the cheapest first, then together."""
    ways = sized.placed.ways
    together: dict[str, str] = {}
    singles: list[Settings] = []
    if spec.optimization.HasField("micro_batch_size") and spec.optimization.micro_batch_size > 1:
        singles.append({"spec.optimization.micro_batch_size": "1"})
    if node.bf16 and sized.gang.on_gpu and not sized.gang.bf16:
        singles.append({"spec.optimization.precision": "bf16"})
    if sized.gang.workers > 1:
        singles += [{"spec.parallelism.zero_stage": str(stage)} for stage in range(ways.stage + 1, 4)]
    if seen.shape.can_recompute and not ways.recomputes:
        singles.append({"spec.parallelism.activation_checkpointing": "true"})
    if sized.gang.on_gpu and not ways.offloads:
        singles.append({"spec.parallelism.offload_optimizer": "true"})
    if spec.HasField("fine_tuning") and not spec.fine_tuning.HasField("lora"):
        singles.append({"spec.fine_tuning.lora.rank": str(PROPOSED_RANK)})
    yield from singles
    for settings in singles:
        together |= settings
    if len(singles) > 1:
        yield together
    for shorter in _shorter(spec, sized.length):
        yield shorter
        yield {**together, **shorter}
    for workers in _more_workers(spec, node):
        stage = {} if spec.parallelism.zero_stage == 3 else {"spec.parallelism.zero_stage": "3"}
        yield {"spec.resources.workers": str(workers), **stage}


def _shorter(spec: spec_pb2.JobSpec, length: int) -> Iterator[Settings]:
    """Half the length, and half of that."""
    wanted = table.message_of(spec)
    for name in _LENGTHS:
        if name in wanted.DESCRIPTOR.fields_by_name:
            for part in (length // 2, length // 4):
                if part >= _SHORTEST:
                    yield {f"{table.path_of(spec)}.{name}": str(part)}


def _more_workers(spec: spec_pb2.JobSpec, node: worker_pb2.NodeShape) -> Iterator[int]:
    """As many as one node has GPUs for: workers on CPUs share the memory that one has."""
    of_worker = spec.resources.gpus_per_worker
    workers = 2 * spec.resources.workers
    while of_worker and workers * of_worker <= node.gpus and workers <= spec.optimization.global_batch_size:
        yield workers
        workers *= 2


def _need(spec: spec_pb2.JobSpec, settings: Settings, seen: Seen, node: worker_pb2.NodeShape) -> Memory | None:
    """The memory with other settings; None: they cannot be."""
    changed = with_settings(spec, settings)
    shorter = 1.0
    for path, value in settings.items():
        if path.rpartition(".")[2] in _LENGTHS:
            shorter = int(value) / max(getattr(table.message_of(spec), path.rpartition(".")[2]), 1)
    try:
        shape = seen.shape_for(changed)
        sized = size_up(changed, seen.task, seen.lesson, shape, node)
    except SpecError:
        return None
    if shorter == 1.0:
        return sized.need
    positions = max(int(sized.batch.micro_batch_size * sized.length * shorter), 1)
    return estimate(shape, sized.gang, sized.placed.ways, positions=positions, batches=sized.batches)


def with_settings(spec: spec_pb2.JobSpec, settings: Settings) -> spec_pb2.JobSpec:
    """A copy of a spec with other settings."""
    changed = spec_pb2.JobSpec()
    changed.CopyFrom(spec)
    for path, value in settings.items():
        _set(changed, path.removeprefix("spec.").split("."), value)
    return changed


def _set(message: Message, path: Sequence[str], value: str) -> None:
    """Writes a value into a field of a message, as text."""
    *parents, name = path
    for parent in parents:
        message = getattr(message, parent)
    old = getattr(message, name)
    if name == "precision":
        setattr(message, name, spec_pb2.PRECISION_BF16)
    else:
        setattr(message, name, value == "true" if isinstance(old, bool) else int(value))
