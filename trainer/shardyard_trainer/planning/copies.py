"""The plan of a job that copies a stored model to an object store: which files, and how many bytes."""

from __future__ import annotations

from collections.abc import Iterator

from shardyard.remote_uris import parse
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.planning.checks import slots_of
from shardyard_trainer.remote.copying import choose

STEP_BYTES = 2**20

_FIELD = "spec.model_copy"


def plan_copy(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, _node: worker_pb2.NodeShape) -> plan_pb2.JobPlan:
    """Plans the job; its steps are mebibytes. Raises SpecError."""
    raise_all(_check(spec))
    wanted = spec.model_copy
    files = locations.known_files[locations.folders[spec.model.model]].files
    chosen = choose(files, wanted.format, parse(wanted.uri), field=_FIELD)
    return plan_pb2.JobPlan(
        resolved_spec=spec,
        batch=plan_pb2.BatchPlan(workers=spec.resources.workers),
        total_steps=max(-(-chosen.num_bytes // STEP_BYTES), 1),
        slots=slots_of(spec),
        output=plan_pb2.JOB_OUTPUT_COPY,
    )


def _check(spec: spec_pb2.JobSpec) -> Iterator[SpecError]:
    if spec.model.WhichOneof("source") != "model":
        message = "a model that the service stores is copied; name one as `model`, or upload it first"
        yield SpecError("spec.model", "SPEC_INVALID", message)
    if spec.resources.workers > 1:
        message = f"{spec.resources.workers} workers: a copy takes the place of one; leave it out"
        yield SpecError("spec.resources.workers", "SPEC_INVALID", message)
