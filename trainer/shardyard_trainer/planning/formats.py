"""The plan of a job that writes a stored model in another format, and what a training job's formats need."""

from __future__ import annotations

from collections.abc import Iterator

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.exporting.support import compared_metric, refusals
from shardyard_trainer.planning.evaluation import plan_measured
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.model_evaluation import look, prepare_evaluation

_FIELD = "spec.model_export"
_POLICY = "spec.export"

_NUM_COPIES = 4
"""The model, the format, and the graph while it is made and loaded, which may be as large as two more."""


def plan_format(
    spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, node: worker_pb2.NodeShape
) -> plan_pb2.JobPlan:
    """Plans the job, and fills everything found into `spec`. Raises SpecError."""
    wanted = spec.model_export
    raise_all(_check(spec))
    choice, task = look(spec, locations)
    # Before the data is read: that of a task that is not supported may not be readable either.
    raise_all(refusals(task, choice.config, [wanted.format], field=f"{_FIELD}.format"))
    found = prepare_evaluation(spec, locations)
    wanted.metric = compared_metric(found.task, wanted.metric, field=f"{_FIELD}.metric")
    return plan_measured(spec, found, locations, node, output=plan_pb2.JOB_OUTPUT_FORMAT, num_copies=_NUM_COPIES)


def check_policy(spec: spec_pb2.JobSpec, task: Prepared) -> None:
    """Fills in the metric that formats are judged by. Raises SpecError if they cannot be made or measured."""
    if not spec.HasField("export"):
        return
    policy = spec.export
    raise_all(refusals(task.task, task.choice.config, policy.formats, field=f"{_POLICY}.formats"))
    if task.eval is None:
        message = "there is no data to measure formats on; give eval_data, or an evaluation.holdout over 0"
        raise SpecError(_POLICY, "SPEC_INVALID", message)
    policy.metric = compared_metric(task, policy.metric, field=f"{_POLICY}.metric")


def _check(spec: spec_pb2.JobSpec) -> Iterator[SpecError]:
    if spec.model.WhichOneof("source") != "model":
        message = "a format becomes part of a model that the service stores; name one as `model`, or upload it first"
        yield SpecError("spec.model", "SPEC_INVALID", message)
    if spec.optimization.precision == spec_pb2.PRECISION_BF16:
        message = "a format is measured beside the model in fp32; leave it out"
        yield SpecError("spec.optimization.precision", "SPEC_INVALID", message)
    if spec.resources.workers > 1:
        message = f"{spec.resources.workers} workers: one writes a format, and the others would wait; leave it out"
        yield SpecError("spec.resources.workers", "SPEC_INVALID", message)
