"""Operations on jobs: finding, changing the state (by one function), cancelling, deleting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, exists, func, literal_column, or_, select, tuple_, update

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import (
    JOB_FIELDS,
    EventDraft,
    EventKind,
    JobRecord,
    Moved,
)
from shardyard_coordinator.domain.states import JobState, may_move
from shardyard_coordinator.domain.steps import IllegalMove, StaleWrite
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import audit, encode, events, project_log, tables
from shardyard_coordinator.store.findable import remove_findable
from shardyard_coordinator.store.sql import Prepared, PreparedUpdate

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
_BY_UID = Prepared(select(*COLUMNS).where(_job.uid == bindparam("uid")))
_BY_ROW = Prepared(select(*COLUMNS).where(_job.id == bindparam("id")))
_BY_NAME = Prepared(
    select(*COLUMNS).where(
        _job.project == bindparam("project"), _job.job_id == bindparam("job_id"), _job.deleted_us == 0
    )
)
_CHANGE = PreparedUpdate(tables.job, _job.uid == bindparam("job"), also={"version": _job.version + 1})
_RECORD = PreparedUpdate(
    tables.job,
    _job.uid == bindparam("job"),
    also={"version": _job.version + 1, "last_sequence": _job.last_sequence + bindparam("count")},
    returning=(_job.last_sequence, _job.version),
)
_MOVE = PreparedUpdate(
    tables.job,
    _job.uid == bindparam("job"),
    _job.state == bindparam("seen"),
    _job.epoch == bindparam("of_epoch"),
    _job.deleted_us == 0,
    also={"version": _job.version + 1, "last_sequence": _job.last_sequence + 1},
    returning=COLUMNS,
)
ANY_ETAG = ("", "*")
_MAX_BLOCKS_REMOVED = 200
# SQLite takes 32,766 values in one statement.
_UIDS_AT_ONCE = 5000


def get_job(conn: Connection, project: str, job_id: str) -> JobRecord:
    """The job of that name. Raises: Refused JOB_NOT_FOUND."""
    row = _BY_NAME.run(conn, project=project, job_id=job_id).first()
    if row is None:
        name = f"projects/{project}/jobs/{job_id}"
        raise Refused(
            Reason.JOB_NOT_FOUND,
            f"there is no job `{name}`; list them with `shardyard jobs` (ListJobs)",
            metadata={"job": name},
        )
    return from_row(row)


def own_job(conn: Connection, project: str, job_id: str, actor: Actor) -> JobRecord:
    """The job of that name, for its change. Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED (another one's job)."""
    job = get_job(conn, project, job_id)
    audit.check_owner(job.name, job.creator, actor)
    return job


def get_job_by_uid(conn: Connection, uid: str) -> JobRecord | None:
    """The job of that uid, also when it has been deleted, until it is purged."""
    row = _BY_UID.run(conn, uid=uid).first()
    return None if row is None else from_row(row)


def get_job_by_row(conn: Connection, row_id: int) -> JobRecord | None:
    """The job with that row id."""
    row = _BY_ROW.run(conn, id=row_id).first()
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
    row = _MOVE.run(conn, values, job=job.uid, seen=job.state.value, of_epoch=job.epoch).first()
    if row is None:
        raise StaleWrite(f"job {job.uid} is no longer {job.state} in attempt {job.epoch}")
    moved = from_row(row)
    changed = encode.state_changed(job.state, to, failure=failure, message=message)
    draft = EventDraft(changed.kind, changed.payload, moved.epoch)
    [event] = events.insert_at(conn, job.uid, moved.last_sequence, [draft], now_us)
    return Moved(moved, event)


def change_job(conn: Connection, job_uid: str, now_us: int, changes: Mapping[str, Any]) -> None:
    """Changes columns other than the state."""
    if "state" in changes:
        raise ValueError("only move() changes a job's state")
    if changes:
        _CHANGE.run(conn, {**changes, "update_us": now_us}, job=job_uid)


def record(
    conn: Connection, job: JobRecord, changes: Mapping[str, Any], drafts: Sequence[EventDraft], now_us: int
) -> JobRecord:
    """Changes columns other than the state and appends events, in one change of the row; returns the changed job.

    `job` is the row as it was read in this transaction.
    """
    if "state" in changes:
        raise ValueError("only move() changes a job's state")
    if not changes and not drafts:
        return job
    values = {**changes, "update_us": now_us}
    [(last, version)] = _RECORD.run(conn, values, job=job.uid, count=len(drafts))
    events.insert_at(conn, job.uid, last - len(drafts) + 1, drafts, now_us)
    return dataclasses.replace(job, **values, last_sequence=last, version=version)


def num_live(conn: Connection, project: str) -> int:
    """How many jobs of a project have not ended."""
    live = [state.value for state in JobState if not state.is_terminal]
    mine = (_job.project == project, _job.deleted_us == 0, _job.state.in_(live))
    return int(conn.execute(select(func.count()).select_from(tables.job).where(*mine)).scalar_one())


def live_specs(conn: Connection, *, naming: bytes) -> list[bytes]:
    """The resolved specs, as bytes of a JobSpec, of all jobs that have not ended and whose specs have these bytes."""
    live = [state.value for state in JobState if not state.is_terminal]
    found = conn.execute(select(_job.resolved_spec).where(_job.deleted_us == 0, _job.state.in_(live)))
    return [bytes(spec) for (spec,) in found if naming in bytes(spec)]


def request_cancel(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Cancels the job: at once if it holds no slots, else it becomes CANCELLING. Idempotent.

    Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED, ETAG_MISMATCH, INVALID_STATE (it has ended otherwise).
    """
    job = own_job(conn, project, job_id, actor)
    if job.state in (JobState.CANCELLING, JobState.CANCELLED):
        return job
    check_etag(job, etag)
    if job.state.is_terminal:
        raise invalid_state(job, "it has ended, so it cannot be cancelled")
    at_once = job.state in (JobState.QUEUED, JobState.PAUSED)
    target = JobState.CANCELLED if at_once else JobState.CANCELLING
    audit.record(conn, actor, job.name, now_us)
    return move(conn, job, target, now_us=now_us, message=f"cancelled by {actor.principal}").job


def delete_job(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Deletes a job that has ended: its name is free at once, its events are kept until they are purged.

    Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED, ETAG_MISMATCH, INVALID_STATE.
    """
    job = own_job(conn, project, job_id, actor)
    check_etag(job, etag)
    if not job.state.is_terminal:
        raise invalid_state(job, "cancel it first, then delete it")
    conn.execute(update(tables.job).where(_job.uid == job.uid).values(deleted_us=now_us))
    remove_findable(conn, job.uid)
    conn.execute(delete(tables.job_use).where(tables.job_use.c.job_uid == job.uid))
    event = job_pb2.JobEvent(deleted=job_pb2.JobDeleted(principal=actor.principal))
    events.append(conn, job.uid, [encode.draft(EventKind.DELETED, event)], now_us)
    audit.record(conn, actor, job.name, now_us)
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


def invalid_state(job: JobRecord, rule: str) -> Refused:
    """INVALID_STATE with the state and the rule that it breaks."""
    return Refused(
        Reason.INVALID_STATE, f"{job.name} is {job.state}: {rule}", metadata={"job": job.name, "state": job.state.value}
    )


def known_uids(conn: Connection, uids: Sequence[str]) -> set[str]:
    """Those of the uids that belong to jobs, including deleted ones that are not purged yet."""
    known: set[str] = set()
    for first in range(0, len(uids), _UIDS_AT_ONCE):
        some = uids[first : first + _UIDS_AT_ONCE]
        known |= set(conn.execute(select(_job.uid).where(_job.uid.in_(some))).scalars())
    return known


def deleted_jobs(conn: Connection, purged_before_us: int) -> list[tuple[str, int]]:
    """(uid, time of deletion) of deleted jobs that still have events, or a row from before that time."""
    has_events = exists().where(tables.event.c.job_uid == _job.uid)
    # A literal, not a parameter, so that the database uses the index of deleted jobs.
    left = (_job.deleted_us > literal_column("0"), or_(has_events, _job.deleted_us <= purged_before_us))
    return [(row.uid, row.deleted_us) for row in conn.execute(select(_job.uid, _job.deleted_us).where(*left))]


def purge_events(conn: Connection, job_uid: str) -> bool:
    """Removes everything of a deleted job except its row, which keeps its request id until `purge_job`.

    Only a part, so that other writers do not wait. True: there may be more.
    """
    block = tables.metric_block.c
    removed = project_log.remove_first(conn, job_uid, events.MAX_REMOVED)
    key = tuple_(block.metric, block.first_index)
    some_blocks = select(block.metric, block.first_index).where(block.job_uid == job_uid).limit(_MAX_BLOCKS_REMOVED)
    blocks = conn.execute(delete(tables.metric_block).where(block.job_uid == job_uid, key.in_(some_blocks))).rowcount
    if removed == events.MAX_REMOVED or blocks == _MAX_BLOCKS_REMOVED:
        return True
    for table in (tables.attempt, tables.checkpoint):
        conn.execute(delete(table).where(table.c.job_uid == job_uid))
    return False


def purge_job(conn: Connection, job_uid: str) -> bool:
    """Removes a deleted job's row and its request id, once nothing else is left. True: there may be more."""
    if purge_events(conn, job_uid):
        return True
    if events.oldest_sequence(conn, job_uid):
        return False  # A webhook still has to deliver its events, with the job's name.
    conn.execute(delete(tables.request).where(_request.job_uid == job_uid))
    conn.execute(delete(tables.job).where(_job.uid == job_uid, _job.deleted_us > 0))
    return False


def from_row(row: Row[Any] | tuple[Any, ...]) -> JobRecord:
    """A row of COLUMNS as a record."""
    values = list(row)
    for index in _BYTES:
        values[index] = values[index] or b""
    values[_STATE] = JobState(values[_STATE])
    return JobRecord(*values)
