"""Operations on jobs: accepted once, moved by one function, listed in stable pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import (
    JOB_FIELDS,
    CreatedJob,
    EventDraft,
    EventKind,
    JobRecord,
    Moved,
    NewJob,
)
from shardyard_coordinator.domain.states import JobState, may_move
from shardyard_coordinator.domain.steps import IllegalMove, StaleWrite
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import encode, events, tables
from shardyard_coordinator.store.sql import Prepared

_job, _request = tables.job.c, tables.request.c
COLUMNS = tuple(_job[name] for name in JOB_FIELDS)
_BYTES = tuple(
    JOB_FIELDS.index(name)
    for name in (
        "description",
        "spec",
        "resolved_spec",
        "plan",
        "progress",
        "evaluation",
        "failure",
        "pending",
        "conditions",
    )
)
_STATE = JOB_FIELDS.index("state")
_CREATED = (
    "uid",
    "project",
    "job_id",
    "display_name",
    "description",
    "queue",
    "priority",
    "task",
    "creator",
    "state",
    "spec",
    "resolved_spec",
    "plan",
    "workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "last_sequence",
    "create_us",
    "update_us",
    "waiting_us",
)
_INSERT = Prepared(
    insert(tables.job).values({name: bindparam(name) for name in _CREATED}).returning(_job.id),
)
_INSERT_REQUEST = Prepared(
    insert(tables.request).values(
        {name: bindparam(name) for name in ("principal", "request_id", "fingerprint", "job_uid")}
    )
)
_INSERT_LABEL = Prepared(
    insert(tables.label).values({name: bindparam(name) for name in ("job_uid", "key", "value")}),
)
_INSERT_USE = Prepared(insert(tables.job_use).values({name: bindparam(name) for name in ("job_uid", "resource")}))
_FIND_REQUEST = Prepared(
    select(_request.fingerprint, _request.job_uid).where(
        _request.principal == bindparam("principal"), _request.request_id == bindparam("request_id")
    )
)
_BY_UID = Prepared(select(*COLUMNS).where(_job.uid == bindparam("uid")))
_BY_NAME = Prepared(
    select(*COLUMNS).where(
        _job.project == bindparam("project"), _job.job_id == bindparam("job_id"), _job.deleted_us == 0
    )
)
_ACCEPTED = encode.state_changed(None, JobState.QUEUED)
ANY_ETAG = ("", "*")


def create_job(conn: Connection, new: NewJob, actor: Actor, now_us: int) -> CreatedJob:
    """Accepts a job: request id, row, labels, event 1 and its plan's warnings, in the caller's transaction.

    The same request of the same principal again answers the job it made. Raises: Refused JOB_EXISTS, REQUEST_ID_REUSED.
    """
    if new.request_id:
        found = find_request(conn, actor.principal, new.request_id, new.fingerprint)
        if found is not None:
            return CreatedJob(found, existed=True)
        _INSERT_REQUEST.run(
            conn,
            principal=actor.principal,
            request_id=new.request_id,
            fingerprint=new.fingerprint,
            job_uid=new.uid,
        )
    job = _insert(conn, new, actor, now_us)
    if new.labels:
        _INSERT_LABEL.run_many(conn, [{"job_uid": new.uid, "key": k, "value": v} for k, v in new.labels.items()])
    if new.uses:
        _INSERT_USE.run_many(conn, [{"job_uid": new.uid, "resource": name} for name in sorted(set(new.uses))])
    events.insert_at(conn, new.uid, 1, [_ACCEPTED, *new.warnings], now_us)
    return CreatedJob(job, existed=False)


def _insert(conn: Connection, new: NewJob, actor: Actor, now_us: int) -> JobRecord:
    values: dict[str, Any] = {
        "uid": new.uid,
        "project": new.project,
        "job_id": new.job_id,
        "display_name": new.display_name,
        "description": new.description,
        "queue": new.queue,
        "priority": new.priority,
        "task": new.task,
        "creator": actor.principal,
        "state": JobState.QUEUED.value,
        "spec": new.spec,
        "resolved_spec": new.resolved_spec,
        "plan": new.plan,
        "workers": new.workers,
        "gpus_per_worker": new.gpus_per_worker,
        "cpus_per_worker": new.cpus_per_worker,
        "last_sequence": 1 + len(new.warnings),
        "create_us": now_us,
        "update_us": now_us,
        "waiting_us": now_us,
    }
    try:
        values["id"] = _INSERT.run(conn, **values).scalar_one()
    except IntegrityError as error:
        name = f"projects/{new.project}/jobs/{new.job_id}"
        raise Refused(
            Reason.JOB_EXISTS, f"{name} exists; choose another job_id, or leave it out", metadata={"job": name}
        ) from error
    values["state"] = JobState.QUEUED
    return JobRecord(**{**_FRESH, **values})


_FRESH: Mapping[str, Any] = {
    **dict.fromkeys(("progress", "evaluation", "failure", "pending", "conditions"), b""),
    **dict.fromkeys(("latest_checkpoint", "best_checkpoint", "model", "output_dataset", "failure_cause"), ""),
    **dict.fromkeys(
        (
            "epoch",
            "recomputed_steps",
            "last_step",
            "not_before_us",
            "failures",
            "failures_in_row",
            "failure_step",
            "failures_at_step",
            "start_us",
            "end_us",
            "deleted_us",
        ),
        0,
    ),
    "version": 1,
    "best_value": None,
    "slot_seconds": 0.0,
}


def find_request(conn: Connection, principal: str, request_id: str, fingerprint: bytes) -> JobRecord | None:
    """The job that the request id has made; None: it is new. Raises: Refused REQUEST_ID_REUSED for another request."""
    row = _FIND_REQUEST.run(conn, principal=principal, request_id=request_id).first()
    if row is None:
        return None
    known, job_uid = row
    job = get_job_by_uid(conn, job_uid)
    if known != fingerprint:
        first = job.name if job is not None else ""
        raise Refused(
            Reason.REQUEST_ID_REUSED,
            f"request_id {request_id} was used for another request, which made {first or 'a job since deleted'}; "
            "make a new one",
            metadata={"first_job": first, "request_id": request_id},
        )
    return job


def get_job(conn: Connection, project: str, job_id: str) -> JobRecord:
    """The job of that name. Raises: Refused JOB_NOT_FOUND."""
    row = _BY_NAME.run(conn, project=project, job_id=job_id).first()
    if row is None:
        name = f"projects/{project}/jobs/{job_id}"
        raise Refused(
            Reason.JOB_NOT_FOUND, f"there is no job `{name}`; list them with ListJobs", metadata={"job": name}
        )
    return from_row(row)


def get_job_by_uid(conn: Connection, uid: str) -> JobRecord | None:
    """The job of that uid, also when it has been deleted, until it is purged."""
    row = _BY_UID.run(conn, uid=uid).first()
    return None if row is None else from_row(row)


def move(
    conn: Connection,
    job: JobRecord,
    to: JobState,
    *,
    now_us: int,
    failure: bytes = b"",
    message: str = "",
    changes: Mapping[str, Any] | None = None,
) -> Moved:
    """The only writer of a job's state: one step of the table, guarded by the state and epoch that were read.

    `changes` are further columns. Raises: IllegalMove, StaleWrite.
    """
    if not may_move(job.state, to):
        raise IllegalMove(job.uid, job.state, to)
    values = {
        **(changes or {}),
        "state": to.value,
        "version": _job.version + 1,
        "last_sequence": _job.last_sequence + 1,
        "update_us": now_us,
    }
    if to.is_terminal:
        values["end_us"] = now_us
    if to is JobState.QUEUED:
        values["waiting_us"] = now_us
    else:
        values["pending"] = None
    if failure:
        values["failure"] = failure
    guard = (_job.uid == job.uid, _job.state == job.state.value, _job.epoch == job.epoch, _job.deleted_us == 0)
    row = conn.execute(update(tables.job).where(*guard).values(**values).returning(*COLUMNS)).first()
    if row is None:
        raise StaleWrite(f"job {job.uid} is no longer {job.state} in attempt {job.epoch}")
    moved = from_row(row)
    told = encode.state_changed(job.state, to, failure=failure, message=message)
    draft = EventDraft(told.kind, told.payload, moved.epoch)
    [event] = events.insert_at(conn, job.uid, moved.last_sequence, [draft], now_us)
    return Moved(moved, event)


def change_job(conn: Connection, job_uid: str, now_us: int, changes: Mapping[str, Any]) -> None:
    """Changes columns other than the state."""
    if "state" in changes:
        raise ValueError("only move() changes a job's state")
    if changes:
        values = {**changes, "version": _job.version + 1, "update_us": now_us}
        conn.execute(update(tables.job).where(_job.uid == job_uid).values(**values))


def request_cancel(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Records that the job is to end: at once where it holds nothing, else CANCELLING. Idempotent.

    Raises: Refused JOB_NOT_FOUND, ETAG_MISMATCH, INVALID_STATE (it has ended otherwise).
    """
    job = get_job(conn, project, job_id)
    if job.state in (JobState.CANCELLING, JobState.CANCELLED):
        return job
    check_etag(job, etag)
    if job.state.is_terminal:
        raise _invalid_state(job, "it has ended, so it cannot be cancelled")
    at_once = job.state in (JobState.QUEUED, JobState.PAUSED)
    target = JobState.CANCELLED if at_once else JobState.CANCELLING
    return move(conn, job, target, now_us=now_us, message=f"cancelled by {actor.principal}").job


def delete_job(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Deletes a job that has ended: its name is free at once, its events are kept until they are purged.

    Raises: Refused JOB_NOT_FOUND, ETAG_MISMATCH, INVALID_STATE.
    """
    job = get_job(conn, project, job_id)
    check_etag(job, etag)
    if not job.state.is_terminal:
        raise _invalid_state(job, "cancel it first, then delete it")
    conn.execute(update(tables.job).where(_job.uid == job.uid).values(deleted_us=now_us))
    conn.execute(delete(tables.label).where(tables.label.c.job_uid == job.uid))
    conn.execute(delete(tables.job_use).where(tables.job_use.c.job_uid == job.uid))
    event = job_pb2.JobEvent(deleted=job_pb2.JobDeleted(principal=actor.principal))
    events.append(conn, job.uid, [encode.draft(EventKind.DELETED, event)], now_us)
    deleted = get_job_by_uid(conn, job.uid)
    assert deleted is not None
    return deleted


def check_etag(job: JobRecord, etag: str) -> None:
    """Raises: Refused ETAG_MISMATCH unless `etag` is the job's, empty or `*`."""
    if etag not in (*ANY_ETAG, job.etag):
        raise Refused(
            Reason.ETAG_MISMATCH,
            f"{job.name} has changed: its etag is {job.etag}, not {etag[:64]!r}; read it again",
            metadata={"job": job.name, "etag": job.etag},
        )


def _invalid_state(job: JobRecord, rule: str) -> Refused:
    return Refused(
        Reason.INVALID_STATE, f"{job.name} is {job.state}: {rule}", metadata={"job": job.name, "state": job.state.value}
    )


def deleted_jobs(conn: Connection) -> list[JobRecord]:
    """Jobs that were deleted and are not purged yet."""
    return [from_row(row) for row in conn.execute(select(*COLUMNS).where(_job.deleted_us > 0).order_by(_job.id))]


def purge_events(conn: Connection, job_uid: str) -> None:
    """Removes what a deleted job has left beside its row, which keeps its request id until `purge_job`."""
    for table in (tables.event, tables.attempt, tables.checkpoint, tables.metric_block):
        conn.execute(delete(table).where(table.c.job_uid == job_uid))


def purge_job(conn: Connection, job_uid: str) -> None:
    """Removes a deleted job's row and its request id."""
    purge_events(conn, job_uid)
    conn.execute(delete(tables.request).where(_request.job_uid == job_uid))
    conn.execute(delete(tables.job).where(_job.uid == job_uid, _job.deleted_us > 0))


def from_row(row: Row[Any] | tuple[Any, ...]) -> JobRecord:
    """A row of COLUMNS as a record."""
    values = list(row)
    for index in _BYTES:
        values[index] = values[index] or b""
    values[_STATE] = JobState(values[_STATE])
    return JobRecord(*values)
