"""Jobs that add a format to a stored model: the folder that they write, and how it becomes part of the model."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

from shardyard.export_formats import prefix_of
from shardyard.v1 import job_pb2, model_service_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.records import AttemptRecord, EventKind, FileRecord, JobRecord, ResourceRecord
from shardyard_coordinator.store import encode, events, jobs, resources


def adds_format(job: JobRecord) -> bool:
    """Whether the job's result is a further format of a model that is stored already."""
    return plan_pb2.JobPlan.FromString(job.plan).output == plan_pb2.JOB_OUTPUT_FORMAT


def part_of(spec: spec_pb2.JobSpec) -> str:
    """The part of a stored model that a job writes, such as `projects/p/models/m/exports/onnx`; empty: none."""
    if not spec.HasField("model_export"):
        return ""
    return f"{spec.model.model}/{prefix_of(spec.model_export.format)}".rstrip("/")


def folder_of(conn: Connection, job: JobRecord) -> Path:
    """The folder that the format belongs in. Raises: Refused MODEL_NOT_FOUND if the model is gone."""
    spec = spec_pb2.JobSpec.FromString(job.resolved_spec)
    return Path(resources.ready_resource(conn, spec.model.model).path) / prefix_of(spec.model_export.format)


def register_format(
    conn: Connection, job: JobRecord, attempt: AttemptRecord, exported: worker_pb2.Exported, now_us: int
) -> ResourceRecord:
    """Adds the verified format to its model, in place of an earlier one. Raises: Refused MODEL_NOT_FOUND."""
    spec = spec_pb2.JobSpec.FromString(job.resolved_spec)
    record = resources.ready_resource(conn, spec.model.model)
    export = model_service_pb2.ModelExport()
    export.CopyFrom(exported.format)
    export.prefix = prefix_of(spec.model_export.format)
    files = [
        FileRecord(file.path, file.size_bytes, file.sha256)
        for file in exported.model.files
        if file.path.startswith(export.prefix)
    ]
    described = encode.with_export(record.description, stamped(export, job, files, now_us))
    record = resources.replace_part(conn, record, export.prefix, files, description=described)
    event = job_pb2.JobEvent(model=job_pb2.ModelRegistered(model=record.name, path=exported.path))
    jobs.change_job(conn, job.uid, now_us, {"model": record.name})
    events.append(conn, job.uid, [encode.draft(EventKind.MODEL, event, attempt.epoch)], now_us)
    return record


def stamped(
    export: model_service_pb2.ModelExport, job: JobRecord, files: list[FileRecord], now_us: int
) -> model_service_pb2.ModelExport:
    """The receipt with what only the coordinator knows: job, time, and the bytes of the files as registered."""
    made = model_service_pb2.ModelExport()
    made.CopyFrom(export)
    made.source_job = job.name
    made.size_bytes = sum(file.size_bytes for file in files if file.path.startswith(export.prefix))
    made.create_time.CopyFrom(encode.timestamp(now_us))
    return made
