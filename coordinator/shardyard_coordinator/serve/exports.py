"""ExportModel and CopyModel: compose the job that adds a format to a model, or copies it, and submit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from google.protobuf.message import Message
from sqlalchemy import Connection

from shardyard.task_paths import leaf_of
from shardyard.v1 import job_pb2, job_service_pb2, model_service_pb2, spec_pb2
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.submit import Submitter
from shardyard_coordinator.store import jobs, resources

_Request = model_service_pb2.ExportModelRequest | model_service_pb2.CopyModelRequest
_EXPORT = (("job.spec.model_export.", ""), ("job.spec.model.model", "model"), ("job.spec.model", "model"))
_COPY = (("job.spec.model_copy.", ""), ("job.spec.model.model", "name"), ("job.spec.model", "name"))
"""Fields of the job that is composed, and those of the request that they come from."""


class Exports:
    """Makes jobs of requests for a model's formats and copies."""

    def __init__(self, parts: Parts, submitter: Submitter) -> None:
        self._parts = parts
        self._submitter = submitter

    async def export(self, request: model_service_pb2.ExportModelRequest, call: Call) -> job_pb2.Job:
        """Submits the job. Raises: Refused with the fields of this request."""
        name = self._parts.name("model", request.model)
        spec = _spec(request)
        if not request.HasField("data"):
            data = await self._parts.store.read(lambda conn: _data_of_training(conn, name.project, name.id))
            spec.model_export.data.CopyFrom(data)
        return await self._submit(spec, name.project, request, call, _EXPORT)

    async def copy(self, request: model_service_pb2.CopyModelRequest, call: Call) -> job_pb2.Job:
        """Submits the job that copies the model to an object store. Raises: Refused with the fields of this request."""
        name = self._parts.name("model", request.name)
        spec = spec_pb2.JobSpec(
            model_copy=spec_pb2.ModelCopy(uri=request.uri, format=request.format),
            model=spec_pb2.ModelSource(model=request.name),
        )
        return await self._submit(spec, name.project, request, call, _COPY)

    async def _submit(
        self, spec: spec_pb2.JobSpec, project: str, request: _Request, call: Call, fields: Sequence[tuple[str, str]]
    ) -> job_pb2.Job:
        """Submits a composed job with the ids of the request that it is for."""
        composed = job_service_pb2.CreateJobRequest(
            parent=f"projects/{project}", request_id=request.request_id, job=job_pb2.Job(spec=spec)
        )
        if request.HasField("job_id"):
            composed.job_id = request.job_id
        try:
            return await self._submitter.create(composed, call)
        except Refused as refused:
            raise _said_here(refused, fields) from None


def _spec(request: model_service_pb2.ExportModelRequest) -> spec_pb2.JobSpec:
    export = spec_pb2.FormatExport(format=request.format, metric=request.metric)
    if request.HasField("data"):
        export.data.CopyFrom(request.data)
    if request.HasField("max_drop"):
        export.max_drop = request.max_drop
    return spec_pb2.JobSpec(model_export=export, model=spec_pb2.ModelSource(model=request.model))


def _data_of_training(conn: Connection, project: str, model_id: str) -> spec_pb2.DataSource:
    """What the job that trained the model was evaluated on. Raises: Refused if that is not a source of its own."""
    record = resources.ready_resource(conn, f"projects/{project}/models/{model_id}")
    if not record.source_job:
        raise _give_data("is missing, and the model was uploaded, so no job has evaluated it")
    _, source_project, _, job_id = record.source_job.split("/")
    try:
        job = jobs.get_job(conn, source_project, job_id)
    except Refused:
        raise _give_data(
            f"is missing, and {record.source_job}, which trained the model, is not there any more"
        ) from None
    if job.model != record.name:  # Its id is used by another one.
        raise _give_data(f"is missing, and {record.source_job}, which trained the model, is gone")
    spec = spec_pb2.JobSpec.FromString(job.resolved_spec)
    if spec.HasField("eval_data"):
        return spec.eval_data
    # A task with a split of its own holds out the same part again.
    if "split" in _fields(leaf_of(spec).message):
        return spec.train_data
    raise _give_data(
        f"is missing, and {record.source_job} was evaluated on a part that it held out of its training data"
    )


def _fields(message: Message) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


def _give_data(why: str) -> Refused:
    return refused_fields([FieldViolation("data", f"{why}; name data to measure the format on")])


def _said_here(refused: Refused, fields: Sequence[tuple[str, str]]) -> Refused:
    """The refusal of the composed job, with the fields of the request."""
    found = [dataclasses.replace(each, field=_here(each.field, fields)) for each in refused.violations]
    message = refused.message
    if found:
        message = refused_fields(found).message
    return Refused(
        refused.reason,
        message,
        metadata=refused.metadata,
        violations=found,
        retry_after_s=refused.retry_after_s,
    )


def _here(field: str, fields: Sequence[tuple[str, str]]) -> str:
    for prefix, here in fields:
        if field.startswith(prefix):
            return here + field.removeprefix(prefix)
    return field.removeprefix("job.spec.")
