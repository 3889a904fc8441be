"""What a job has made becomes a model or a data set of its project."""

from __future__ import annotations

import re

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.attempt_spec import output_kind
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
) -> ResourceRecord:
    """Registers the verified result under the job's own id, or that id and the uid's beginning where it is taken."""
    kind = output_kind(job)
    made = exported.model
    new = NewUpload(
        kind=kind,
        project=job.project,
        resource_id=_free_id(conn, kind, job),
        uid=attempt.export_uid,
        path=exported.path,
        display_name=job.display_name,
        request_id="",
        files=tuple(FileRecord(file.path, file.size_bytes, file.sha256) for file in made.files),
    )
    description = model_service_pb2.Model(
        model_type=made.model_type,
        task=made.task,
        labels=made.labels,
        num_parameters=made.num_parameters,
        metrics=made.metrics,
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
    told = EventKind.MODEL if kind is ResourceKind.MODEL else EventKind.DATASET
    events.append(conn, job.uid, [encode.draft(told, event, attempt.epoch)], now_us)
    return record


def _free_id(conn: Connection, kind: ResourceKind, job: JobRecord) -> str:
    try:
        resources.get_resource(conn, kind, job.project, job.job_id)
    except Refused as refused:
        if refused.reason in (Reason.MODEL_NOT_FOUND, Reason.DATASET_NOT_FOUND):
            return job.job_id
        raise
    suffix = f"-{job.uid[:8]}"
    return re.sub(r"-+$", "", job.job_id[: _MAX_ID - len(suffix)]) + suffix
