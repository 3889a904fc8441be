"""The plan of a model's evaluation, from the model's own task as the ranks will read it."""

from __future__ import annotations

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.inspect import check_weights
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.data.stats import loss_warnings
from shardyard_trainer.inputs.base import INSTANCES_AT_ONCE, POSITIONS_AT_ONCE
from shardyard_trainer.models import sources
from shardyard_trainer.planning import memory, resolve
from shardyard_trainer.planning.checks import node_memory_of_worker, reserved_bytes, slots_of
from shardyard_trainer.planning.identity import data_fingerprint
from shardyard_trainer.planning.pins import model_fingerprint
from shardyard_trainer.planning.seen import shape_of
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.model_evaluation import Measured, prepare_evaluation


def plan_evaluation(
    spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, node: worker_pb2.NodeShape
) -> plan_pb2.JobPlan:
    """Plans the evaluation, and fills everything found into `spec`. Raises SpecError."""
    found = prepare_evaluation(spec, locations)
    return plan_measured(spec, found, locations, node, output=plan_pb2.JOB_OUTPUT_METRICS)


def plan_measured(
    spec: spec_pb2.JobSpec,
    found: Measured,
    locations: worker_pb2.Locations,
    node: worker_pb2.NodeShape,
    *,
    output: plan_pb2.JobOutput.ValueType,
    num_copies: int = 1,
) -> plan_pb2.JobPlan:
    """The plan of a job that measures a model, with this many copies of its weights in memory. Raises SpecError."""
    task, samples, field = found.task, found.task.eval, f"{table.path_of(spec)}.data"
    if samples is None or not samples.num_samples:
        raise SpecError(field, "DATA_INVALID", "nothing of it can be measured; give more data")
    _check_weights(spec, task)
    sources.pin(spec.model, task.choice.pinned)
    resolve.fill_source(
        table.message_of(spec).data, resolve_source(table.message_of(spec).data, locations, field=field)
    )
    optimization = spec.optimization
    if not optimization.HasField("micro_batch_size"):
        optimization.micro_batch_size = _samples_at_once(task)
    if not optimization.HasField("seed"):
        optimization.seed = 0
    micro = optimization.micro_batch_size
    need = _memory(spec, task, node, positions=micro * _longest(task), num_copies=num_copies)
    stats = samples.stats()
    warnings = [job_pb2.Warning(reason=each.reason, message=each.message, field=each.field) for each in found.warnings]
    warnings += loss_warnings(stats, of="measured", length=task.length, field="spec.model", data_field=field)
    return plan_pb2.JobPlan(
        resolved_spec=spec,
        batch=plan_pb2.BatchPlan(workers=spec.resources.workers, micro_batch_size=micro),
        num_parameters=need.parameters // (_bytes_of_number(spec) * num_copies),
        memory=need.to_proto(reserved_bytes(spec, node)),
        total_steps=-(-samples.num_samples // micro),
        num_eval_samples=samples.num_samples,
        labels=list(task.describe().get("labels") or ()),
        warnings=warnings,
        slots=slots_of(spec),
        data_fingerprint=data_fingerprint(spec, locations),
        model_fingerprint=model_fingerprint(spec, locations),
        output=output,
        eval_stats=stats.to_proto(),
    )


def micro_batch_size(spec: spec_pb2.JobSpec, measured: Measured) -> int:
    """The samples that a worker computes at once: as planned, else as a plan would choose."""
    optimization = spec.optimization
    if optimization.HasField("micro_batch_size"):
        return max(optimization.micro_batch_size, 1)
    return _samples_at_once(measured.task)


def _samples_at_once(task: Prepared) -> int:
    return max(1, min(INSTANCES_AT_ONCE, POSITIONS_AT_ONCE // _longest(task)))


def _longest(task: Prepared) -> int:
    lengths = task.eval.lengths() if task.eval is not None else None
    return task.length if lengths is None or not len(lengths) else max(int(lengths.max()), 1)


def _check_weights(spec: spec_pb2.JobSpec, task: Prepared) -> None:
    """Checks weights that were not inspected yet (a registered model's were). Raises SpecError with all errors."""
    kind = spec.model.WhichOneof("source")
    if kind == "model" or task.choice.folder is None:
        return
    field = f"spec.model.{kind}"
    raise_all([SpecError(field, each.reason, str(each), each.metadata) for each in check_weights(task.choice.folder)])


def _bytes_of_number(spec: spec_pb2.JobSpec) -> int:
    return 2 if spec.optimization.precision == spec_pb2.PRECISION_BF16 else 4


def _memory(
    spec: spec_pb2.JobSpec, task: Prepared, node: worker_pb2.NodeShape, *, positions: int, num_copies: int
) -> memory.Memory:
    """The memory of the whole model on each worker and a micro batch's outputs. Raises SpecError MODEL_DOES_NOT_FIT."""
    shape = shape_of(task, spec_pb2.JobSpec())
    on_gpu = spec.resources.gpus_per_worker > 0
    held = min(positions, shape.chunk) if shape.chunk else positions
    need = memory.Memory(
        parameters=_bytes_of_number(spec) * shape.num_parameters * num_copies,
        gradients=0,
        optimizer=0,
        activations=0,
        logits=4 * shape.num_logits * held,
        batches=0,
        process=memory.GPU_PROCESS_BYTES if on_gpu else memory.CPU_PROCESS_BYTES,
        available=node.gpu_memory_bytes if on_gpu else node_memory_of_worker(spec, node),
        on_gpu=on_gpu,
    )
    if need.verdict == plan_pb2.MEMORY_VERDICT_NO_FIT:
        copies = f" in {num_copies} copies" if num_copies > 1 else ""
        raise SpecError(
            "spec.model",
            "MODEL_DOES_NOT_FIT",
            f"{shape.num_parameters:,} parameters are {need.states:,} bytes{copies}, which each worker holds, but "
            f"a worker has {need.available:,}; use larger workers, or a smaller model",
            {"states_bytes": str(need.states), "available_bytes": str(need.available)},
        )
    return need
