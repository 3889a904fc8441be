"""Operations on attempts: recorded before they are launched, fenced by their epoch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Row, bindparam, insert, literal_column, select, update

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import AttemptRecord, EventKind, HeldSlots, JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.store import encode, events, jobs, tables
from shardyard_coordinator.store.sql import Prepared, PreparedUpdate

_attempt = tables.attempt.c
_FIELDS = tuple(field.name for field in dataclasses.fields(AttemptRecord))
_COLUMNS = tuple(_attempt[name] for name in _FIELDS)
_MINE = (_attempt.job_uid == bindparam("job"), _attempt.epoch == bindparam("of_epoch"))
_AS_SEEN = (*_MINE, _attempt.state == bindparam("seen"))
_GET = Prepared(select(*_COLUMNS).where(*_MINE))
_CHANGE = PreparedUpdate(tables.attempt, *_AS_SEEN, returning=_COLUMNS)
_TAKE = Prepared(
    update(tables.attempt)
    .where(*_AS_SEEN, _attempt.high_water == bindparam("before"))
    .values(high_water=bindparam("last"))
)
# A literal, not a parameter: only then does the database use the partial index.
_LIVE = Prepared(
    select(*_COLUMNS)
    .where(_attempt.state != literal_column(f"'{AttemptState.ENDED.value}'"))
    .order_by(_attempt.job_uid, _attempt.epoch)
)
_HELD = Prepared(
    select(_attempt.job_uid, _attempt.epoch, _attempt.slots_per_worker, _attempt.placement)
    .where(_attempt.state != literal_column(f"'{AttemptState.ENDED.value}'"))
    .order_by(_attempt.job_uid, _attempt.epoch)
)


def start_attempt(
    conn: Connection,
    job: JobRecord,
    placement: Sequence[tuple[str, int]],
    *,
    cluster_id: str,
    export_uid: str,
    now_us: int,
) -> tuple[JobRecord, AttemptRecord]:
    """Records a launch before it happens: QUEUED → PREPARING, the next epoch, STARTING.

    `placement` has (node, workers on it) pairs. Raises: StaleWrite if the job is no longer queued.
    """
    epoch = job.epoch + 1
    nodes = [node for node, workers in placement for _ in range(workers)]
    conn.execute(
        insert(tables.attempt).values(
            job_uid=job.uid,
            epoch=epoch,
            state=AttemptState.STARTING.value,
            workers=len(nodes),
            slots_per_worker=job.slots_per_worker,
            placement=json.dumps(list(placement)),
            nodes=json.dumps(nodes),
            cluster_id=cluster_id,
            export_uid=export_uid,
            create_us=now_us,
        )
    )
    # A node's id is 56 digits on Ray; the first ones distinguish nodes, and the attempt has all of them.
    message = f"attempt {epoch} on {', '.join(node[:12] for node in sorted(set(nodes)))}"
    changes = {"epoch": epoch, "not_before_us": 0, "failure": None}
    moved = jobs.move(conn, job, JobState.PREPARING, now_us=now_us, message=message, changes=changes).job
    attempt = require_attempt(conn, job.uid, epoch)
    append_attempt_event(conn, moved, attempt, now_us)
    return moved, attempt


def change_attempt(conn: Connection, attempt: AttemptRecord, changes: Mapping[str, Any]) -> AttemptRecord:
    """Changes columns of an attempt that is in the state that was read. Raises: StaleWrite."""
    mine = {"job": attempt.job_uid, "of_epoch": attempt.epoch, "seen": attempt.state.value}
    row = _CHANGE.run(conn, changes, **mine).first()
    if row is None:
        raise StaleWrite(f"attempt {attempt.epoch} of job {attempt.job_uid} is no longer {attempt.state}")
    return _from_row(row)


def move_attempt(
    conn: Connection,
    job: JobRecord,
    attempt: AttemptRecord,
    to: AttemptState,
    *,
    now_us: int,
    changes: Mapping[str, Any] | None = None,
) -> AttemptRecord:
    """Moves an attempt and appends the event. Raises: StaleWrite."""
    values = {**(changes or {}), "state": to.value}
    if to is AttemptState.ENDED:
        values["end_us"] = now_us
    moved = change_attempt(conn, attempt, values)
    append_attempt_event(conn, job, moved, now_us)
    return moved


def append_attempt_event(conn: Connection, job: JobRecord, attempt: AttemptRecord, now_us: int) -> None:
    """Appends the event that shows the attempt as it is."""
    change = job_pb2.AttemptChanged(attempt=encode.attempt_to_proto(job, attempt))
    event = job_pb2.JobEvent(attempt_changed=change)
    events.append(conn, job.uid, [encode.draft(EventKind.ATTEMPT, event, attempt.epoch)], now_us)


def take_events(conn: Connection, attempt: AttemptRecord, last: int) -> AttemptRecord:
    """Moves the high-water mark to `last`, in the transaction that records the events up to it. Raises: StaleWrite."""
    mine = {"job": attempt.job_uid, "of_epoch": attempt.epoch, "seen": attempt.state.value}
    taken = _TAKE.run(conn, last=last, before=attempt.high_water, **mine).rowcount == 1
    if not taken or attempt.state is AttemptState.ENDED:
        raise StaleWrite(f"attempt {attempt.epoch} of job {attempt.job_uid} is no longer {attempt.state}")
    return dataclasses.replace(attempt, high_water=last)


def get_attempt(conn: Connection, job_uid: str, epoch: int) -> AttemptRecord | None:
    """The attempt of a job and epoch, or None."""
    row = _GET.run(conn, job=job_uid, of_epoch=epoch).first()
    return None if row is None else _from_row(row)


def require_attempt(conn: Connection, job_uid: str, epoch: int) -> AttemptRecord:
    """The attempt. Raises: StaleWrite if there is none (any more)."""
    attempt = get_attempt(conn, job_uid, epoch)
    if attempt is None:
        raise StaleWrite(f"there is no attempt {epoch} of job {job_uid}")
    return attempt


def list_attempts(conn: Connection, job_uid: str, *, after_epoch: int = 0, limit: int = 50) -> list[AttemptRecord]:
    """A page of a job's attempts, the oldest first."""
    statement = select(*_COLUMNS).where(_attempt.job_uid == job_uid, _attempt.epoch > after_epoch)
    return [_from_row(row) for row in conn.execute(statement.order_by(_attempt.epoch).limit(limit))]


def live_attempts(conn: Connection) -> list[AttemptRecord]:
    """Every attempt that has not ended; these hold slots."""
    return [_from_row(row) for row in _LIVE.run(conn)]


def held_slots(conn: Connection) -> list[HeldSlots]:
    """The slots of every attempt that has not ended."""
    return [HeldSlots(uid, epoch, slots, _placement(text)) for uid, epoch, slots, text in _HELD.run(conn)]


def unreleased_attempts(conn: Connection) -> list[AttemptRecord]:
    """Attempts that have ended, but whose supervisor was not released yet."""
    statement = select(*_COLUMNS).where(_attempt.released == 0, _attempt.state == AttemptState.ENDED.value)
    return [_from_row(row) for row in conn.execute(statement.order_by(_attempt.job_uid, _attempt.epoch))]


def release_attempt(conn: Connection, job_uid: str, epoch: int) -> None:
    """Records that nothing of the attempt is left on the cluster."""
    mine = (_attempt.job_uid == job_uid, _attempt.epoch == epoch)
    conn.execute(update(tables.attempt).where(*mine).values(released=1))


def _from_row(row: Row[Any] | tuple[Any, ...]) -> AttemptRecord:
    values = dict(zip(_FIELDS, row, strict=True))
    values["state"] = AttemptState(values["state"])
    values["failure"] = values["failure"] or b""
    values["placement"] = _placement(values["placement"])
    values["nodes"] = tuple(json.loads(values["nodes"] or "[]"))
    return AttemptRecord(**values)


@lru_cache(maxsize=16_384)
def _placement(text: str) -> tuple[tuple[str, int], ...]:
    """Cached: many gangs have the same placement, and every pass of the scheduling loop reads it."""
    return tuple((node, workers) for node, workers in json.loads(text or "[]"))
