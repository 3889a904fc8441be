"""The queue as the scheduling loop reads it: few columns, everybody's place in line, the reasons of a whole pass."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, func, or_, select, update

from shardyard_coordinator.domain.records import EventDraft, QueuedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import events, tables
from shardyard_coordinator.store.sql import Prepared

_job = tables.job.c
_FIELDS = tuple(name for name in QueuedJob._fields if name != "position")
_RANKED = (
    select(
        *(_job[name] for name in _FIELDS),
        func.row_number().over(order_by=(_job.priority.desc(), _job.id)).label("position"),
    )
    .where(_job.state == bindparam("state"), _job.deleted_us == 0)
    .subquery()
)
_ALL = Prepared(select(_RANKED).order_by(_RANKED.c.position))
_SOME = Prepared(
    select(_RANKED)
    .where(
        or_(_RANKED.c.position <= bindparam("first"), _RANKED.c.pending.is_(None), _RANKED.c.not_before_us > 0),
    )
    .order_by(_RANKED.c.position)
    .limit(bindparam("most"))
)
_SET_PENDING = Prepared(
    update(tables.job)
    .where(_job.uid == bindparam("job"), _job.version == bindparam("seen"), _job.state == bindparam("queued"))
    .values(
        pending=bindparam("info"),
        last_sequence=_job.last_sequence + bindparam("count"),
        version=_job.version + 1,
        update_us=bindparam("now"),
    )
    .returning(_job.last_sequence)
)


def all_queued(conn: Connection) -> list[QueuedJob]:
    """Everybody who waits, in the order of the line."""
    return [QueuedJob(*row) for row in _ALL.run(conn, state=JobState.QUEUED.value)]


def some_queued(conn: Connection, first: int, most: int) -> list[QueuedJob]:
    """At most `most`, in the order of the line: the `first` of it, who has no reason yet, and who backs off."""
    return [QueuedJob(*row) for row in _SOME.run(conn, state=JobState.QUEUED.value, first=first, most=most)]


def set_pending(conn: Connection, job: QueuedJob, info: bytes, event: EventDraft | None, now_us: int) -> None:
    """Records why a job waits, with an event if there is one; nothing where the job has changed since it was read."""
    values: dict[str, Any] = {"job": job.uid, "seen": job.version, "queued": JobState.QUEUED.value, "now": now_us}
    row = _SET_PENDING.run(conn, info=info, count=int(event is not None), **values).first()
    if row is not None and event is not None:
        events.insert_at(conn, job.uid, row[0], [event], now_us)
