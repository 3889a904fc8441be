"""The event log: dense in a job, rising over the store, sent only after its commit (docs/event-log.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, func, select, update

from shardyard_coordinator.domain.records import EventDraft, EventKind, EventRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import encode, project_log, tables
from shardyard_coordinator.store.sql import Prepared, PreparedInsert, note_events

_event, _job = tables.event.c, tables.job.c

# The sequence is taken from the job's row, whose change serialises all who append to it.
_TAKE = Prepared(
    update(tables.job)
    .where(_job.uid == bindparam("job"))
    .values(
        last_sequence=_job.last_sequence + bindparam("count"),
        version=_job.version + 1,
        update_us=bindparam("now"),
    )
    .returning(_job.last_sequence)
)
_INSERT = PreparedInsert(
    tables.event,
    ("job_uid", "sequence", "time_us", "attempt", "kind", "payload"),
    returning=("job_uid", "sequence", "position"),
)
_COLUMNS = (
    _event.position,
    _event.job_uid,
    _event.sequence,
    _event.time_us,
    _event.attempt,
    _event.kind,
    _event.payload,
)
_AFTER = Prepared(
    select(*_COLUMNS)
    .where(_event.job_uid == bindparam("job"), _event.sequence > bindparam("after"))
    .order_by(_event.sequence)
    .limit(bindparam("most"))
)
# Removing more at a time would delay all other writers.
MAX_REMOVED = 5000


def append(conn: Connection, job_uid: str, drafts: Sequence[EventDraft], now_us: int) -> list[EventRecord]:
    """Records events at the end of a job's log."""
    if not drafts:
        return []
    last = _TAKE.run(conn, job=job_uid, count=len(drafts), now=now_us).scalar_one()
    return insert_at(conn, job_uid, last - len(drafts) + 1, drafts, now_us)


def insert_at(
    conn: Connection, job_uid: str, first: int, drafts: Sequence[EventDraft], now_us: int
) -> list[EventRecord]:
    """Records events whose sequences, from `first` on, the caller has taken from the job's row."""
    return insert_logs(conn, [(job_uid, first, drafts)], now_us)


def insert_logs(
    conn: Connection, logs: Sequence[tuple[str, int, Sequence[EventDraft]]], now_us: int
) -> list[EventRecord]:
    """The same for several jobs: (uid, first sequence, drafts) of each."""
    rows = [
        {
            "job_uid": job_uid,
            "sequence": sequence,
            "time_us": now_us,
            "attempt": draft.attempt,
            "kind": int(draft.kind),
            "payload": draft.payload,
        }
        for job_uid, first, drafts in logs
        for sequence, draft in enumerate(drafts, first)
    ]
    positions = {(uid, sequence): position for uid, sequence, position in _INSERT.run(conn, rows)}
    records = [
        EventRecord(positions[job_uid, sequence], job_uid, sequence, now_us, draft.attempt, draft.kind, draft.payload)
        for job_uid, first, drafts in logs
        for sequence, draft in enumerate(drafts, first)
    ]
    note_events(conn, records)
    return records


def events_after(conn: Connection, job_uid: str, after: int, limit: int) -> list[EventRecord]:
    """At most `limit` events with a sequence over `after`, in order."""
    rows = _AFTER.run(conn, job=job_uid, after=after, most=limit)
    return [
        EventRecord(position, uid, sequence, time_us, attempt, EventKind(kind), payload)
        for position, uid, sequence, time_us, attempt, kind, payload in rows
    ]


def time_in_state(conn: Connection, job_uid: str, state: JobState) -> int:
    """Microseconds that a job has spent in a state, finished visits only."""
    statement = (
        select(_event.time_us, _event.payload)
        .where(_event.job_uid == job_uid, _event.kind == int(EventKind.STATE))
        .order_by(_event.sequence)
    )
    spent_us, since_us = 0, None
    for time_us, payload in conn.execute(statement):
        if since_us is not None:
            spent_us += max(time_us - since_us, 0)
        since_us = time_us if encode.state_after(payload) is state else None
    return spent_us


def oldest_sequence(conn: Connection, job_uid: str) -> int:
    """The sequence of the oldest event that still exists; 0 if there is none."""
    return conn.execute(select(func.min(_event.sequence)).where(_event.job_uid == job_uid)).scalar_one() or 0


class Expired(NamedTuple):
    """A job whose events before `last` may be removed; `oldest` is the first that still exists."""

    row: int
    job_uid: str
    oldest: int
    last: int


def expired_events(conn: Connection, before_us: int, *, after_row: int = 0, limit: int = 1000) -> list[Expired]:
    """Jobs that ended before `before_us` and have more than their last event left, by their rows after `after_row`."""
    oldest = select(func.min(_event.sequence)).where(_event.job_uid == _job.uid).scalar_subquery()
    ended = (_job.end_us > 0, _job.end_us < before_us, _job.deleted_us == 0, _job.id > after_row)
    statement = select(_job.id, _job.uid, oldest, _job.last_sequence).where(*ended, oldest < _job.last_sequence)
    return [Expired(*row) for row in conn.execute(statement.order_by(_job.id).limit(limit))]


def in_batches(expired: Iterable[Expired], most: int = MAX_REMOVED) -> Iterator[list[tuple[str, int]]]:
    """Batches for `remove_events`: (uid, first sequence to keep), together at most `most` events."""
    batch: list[tuple[str, int]] = []
    room = most
    for each in expired:
        first = each.oldest
        while first < each.last:
            taken = min(room, each.last - first)
            first, room = first + taken, room - taken
            batch.append((each.job_uid, first))
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def remove_events(conn: Connection, batch: Sequence[tuple[str, int]]) -> None:
    """Removes the events of each job before a sequence, except those that a webhook has to deliver."""
    for job_uid, below in batch:
        project_log.remove_before(conn, job_uid, below)
