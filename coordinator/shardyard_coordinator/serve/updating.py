"""UpdateJob: what may change of a job, in one transaction with its event."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, spec_pb2
from shardyard.v1 import job_service_pb2 as pb
from shardyard_coordinator.control.retention import KEEP_LAST
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.records import EventKind, JobRecord
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.serve.submit import queue_of
from shardyard_coordinator.serve.validation.requests import annotation_sizes
from shardyard_coordinator.serve.validation.updates import ALWAYS, MAPS, key_of
from shardyard_coordinator.store import audit, encode, jobs
from shardyard_coordinator.store.findable import Findable, replace_findable

_MAX_PAIRS = {"labels": 64, "annotations": 1024}


def update_job(
    conn: Connection, project: str, job_id: str, request: pb.UpdateJobRequest, *, actor: Actor, now_us: int
) -> JobRecord:
    """Changes the fields of the request's mask, which was checked; a job that is so already stays as it is.

    With `validate_only` nothing is written. Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED, ETAG_MISMATCH,
    INVALID_STATE, QUEUE_NOT_FOUND, and with every field that would be too large.
    """
    job, wanted, paths = jobs.own_job(conn, project, job_id, actor), request.job, list(request.update_mask.paths)
    jobs.check_etag(job, wanted.etag)
    if job.state.is_terminal and any(path.partition(".")[0] not in ALWAYS for path in paths):
        raise jobs.invalid_state(job, f"only {', '.join(ALWAYS)} can be changed once it has ended")
    description = job_pb2.Job.FromString(job.description)
    changes = {
        **_described(job, description, wanted, paths),
        **_scheduled(wanted, paths),
        **_limits(job, wanted, paths),
    }
    changes = {name: value for name, value in changes.items() if getattr(job, name) != value}
    if not changes:
        return job
    updated = dataclasses.replace(job, **changes)
    if request.validate_only:
        return updated
    if "description" in changes:
        attributes = encode.attributes_of(description)
        replace_findable(conn, Findable(job.uid, job.id, project, job.create_us, description.labels, attributes))
    # Nothing may follow a terminal event.
    drafts = [] if job.state.is_terminal else [_event(paths, actor)]
    audit.record(conn, actor, job.name, now_us)
    return jobs.record(conn, job, changes, drafts, now_us)


def _event(paths: Sequence[str], actor: Actor) -> Any:
    updated = job_pb2.JobUpdated(fields=paths, principal=actor.principal)
    return encode.draft(EventKind.UPDATED, job_pb2.JobEvent(updated=updated))


def _described(job: JobRecord, description: job_pb2.Job, wanted: job_pb2.Job, paths: Sequence[str]) -> dict[str, Any]:
    """Changes the description in place; returns the columns of the row that it and the display name are in."""
    for path in paths:
        if path in MAPS:
            getattr(description, path).clear()
            getattr(description, path).update(getattr(wanted, path))
        elif (pair := key_of(path)) is not None:
            owner, key = pair
            getattr(description, owner).pop(key, None)
            if key in getattr(wanted, owner):
                getattr(description, owner)[key] = getattr(wanted, owner)[key]
        elif path == "external_uri":
            description.external_uri = wanted.external_uri
    found = annotation_sizes(description)
    for name, most in _MAX_PAIRS.items():
        if (count := len(getattr(description, name))) > most:
            found.append(FieldViolation(f"job.{name}", f"{count} in all; at most {most} are allowed; remove some"))
    if found:
        raise refused_fields(found)
    changes: dict[str, Any] = {"description": description.SerializeToString(deterministic=True)}
    if job_pb2.Job.FromString(job.description) == description:
        changes = {}
    if "display_name" in paths:
        changes["display_name"] = wanted.display_name
    return changes


def _scheduled(wanted: job_pb2.Job, paths: Sequence[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if "queue" in paths:
        changes["queue"] = queue_of(wanted)
    if "priority" in paths:
        changes["priority"] = int(wanted.priority or job_pb2.PRIORITY_NORMAL)
    return changes


def _limits(job: JobRecord, wanted: job_pb2.Job, paths: Sequence[str]) -> dict[str, Any]:
    """The spec as submitted and the resolved one, with new limits; a cleared one gets its default in the latter."""
    wished = [path for path in paths if path.startswith("spec.")]
    if not wished:
        return {}
    changes: dict[str, Any] = {}
    for column in ("spec", "resolved_spec"):
        spec = spec_pb2.JobSpec.FromString(getattr(job, column))
        before = spec_pb2.JobSpec()
        before.CopyFrom(spec)
        for path in wished:
            _set_limit(spec, wanted.spec, path, resolved=column == "resolved_spec")
        if spec != before:
            changes[column] = spec.SerializeToString(deterministic=True)
    return changes


def _set_limit(spec: spec_pb2.JobSpec, wanted: spec_pb2.JobSpec, path: str, *, resolved: bool) -> None:
    match path:
        case "spec.retry.max":
            spec.retry.ClearField("max")
            if wanted.retry.HasField("max"):
                spec.retry.max = wanted.retry.max
        case "spec.max_run_time":
            spec.ClearField("max_run_time")
            if wanted.HasField("max_run_time"):
                spec.max_run_time.CopyFrom(wanted.max_run_time)
        case "spec.checkpoints.keep_last":
            spec.checkpoints.ClearField("keep_last")
            if wanted.checkpoints.HasField("keep_last"):
                spec.checkpoints.keep_last = wanted.checkpoints.keep_last
            elif resolved:
                spec.checkpoints.keep_last = KEEP_LAST
