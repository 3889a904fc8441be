"""Registers a job's result as a model or a data set of its project."""

from __future__ import annotations

import re

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.attempt_spec import output_kind
from shardyard_coordinator.control.formats import adds_format, register_format, stamped
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import (
    AttemptRecord,
    EventKind,
    FileRecord,
    JobRecord,
    NewUpload,
    ResourceKind,
    ResourceRecord,
)
from shardyard_coordinator.store import encode, events, jobs, resources

_MAX_ID = 63


def register(
    conn: Connection, job: JobRecord, attempt: AttemptRecord, exported: worker_pb2.Exported, now_us: int
) -> ResourceRecord | None:
    """Registers the verified result under the job's own id, or that id and a part of its uid if it is taken.

    A further format becomes part of the model that it is of. None if the job's result is its metrics.
    """
    if adds_format(job):
        return register_format(conn, job, attempt, exported, now_us)
    kind = output_kind(job)
    if kind is None:
        return None
    made = exported.model
    files = [FileRecord(file.path, file.size_bytes, file.sha256) for file in made.files]
    new = NewUpload(
        kind=kind,
        project=job.project,
        resource_id=_free_id(conn, kind, job),
        uid=attempt.export_uid,
        path=exported.path,
        display_name=job.display_name,
        request_id="",
        files=tuple(files),
    )
    description = model_service_pb2.Model(
        model_type=made.model_type,
        task=made.task,
        labels=made.labels,
        num_parameters=made.num_parameters,
        inputs=made.inputs,
        parameters=made.parameters,
        metrics=made.metrics,
        exports=[stamped(export, job, files, now_us) for export in made.exports],
    )
    record = resources.register_output(
        conn,
        new,
        source_job=job.name,
        creator=job.creator,
        description=description.SerializeToString(),
        now_us=now_us,
    )
    if kind is ResourceKind.MODEL:
        event = job_pb2.JobEvent(model=job_pb2.ModelRegistered(model=record.name, path=record.path))
        jobs.change_job(conn, job.uid, now_us, {"model": record.name})
    else:
        event = job_pb2.JobEvent(dataset=job_pb2.DatasetRegistered(dataset=record.name, path=record.path))
        jobs.change_job(conn, job.uid, now_us, {"output_dataset": record.name})
    kind_of_event = EventKind.MODEL if kind is ResourceKind.MODEL else EventKind.DATASET
    events.append(conn, job.uid, [encode.draft(kind_of_event, event, attempt.epoch)], now_us)
    return record


def _free_id(conn: Connection, kind: ResourceKind, job: JobRecord) -> str:
    """An id that is not taken, so that a taken name never prevents the registration of a result."""
    with_part = _with_suffix(job.job_id, job.uid[-8:])
    free = (each for each in (job.job_id, with_part) if not _is_taken(conn, kind, job.project, each))
    return next(free, _with_suffix(job.job_id, job.uid))


def _with_suffix(job_id: str, suffix: str) -> str:
    return re.sub(r"-+$", "", job_id[: _MAX_ID - len(suffix) - 1]) + f"-{suffix}"


def _is_taken(conn: Connection, kind: ResourceKind, project: str, resource_id: str) -> bool:
    try:
        resources.get_resource(conn, kind, project, resource_id)
    except Refused as refused:
        if refused.reason in (Reason.MODEL_NOT_FOUND, Reason.DATASET_NOT_FOUND):
            return False
        raise
    return True
