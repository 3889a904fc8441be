"""The queue as the scheduling loop reads it: few columns, everybody's place in line, the reasons of a whole pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, or_, select, update

from shardyard_coordinator.domain.records import EventDraft, QueuedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import events, tables
from shardyard_coordinator.store.sql import Prepared

_job = tables.job.c
_FIELDS = tuple(name for name in QueuedJob._fields if name != "position")
# Everybody's place in line, from the index `job_line` alone: a job's row is long, and is read where it is asked for.
_LINE = (
    select(
        _job.id,
        _job.not_before_us,
        _job.pending,
        func.row_number().over(order_by=(_job.priority.desc(), _job.id)).label("position"),
    )
    .where(_job.state == bindparam("state"), _job.deleted_us == 0)
    .subquery()
)
_QUEUED = select(*(_job[name] for name in _FIELDS), _LINE.c.position).join(_LINE, _job.id == _LINE.c.id)
_ALL = Prepared(_QUEUED.order_by(_LINE.c.position))
_SOME = Prepared(
    _QUEUED.where(
        or_(
            _LINE.c.position <= bindparam("first"),
            _LINE.c.position.between(bindparam("after") + 1, bindparam("until")),
            _LINE.c.pending.is_(None),
            _LINE.c.not_before_us > 0,
        )
    )
    .order_by(_LINE.c.position)
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


def some_queued(conn: Connection, first: int, after: int, until: int, most: int) -> list[QueuedJob]:
    """At most `most`, in the order of the line: the `first` of it, those in the places over `after` and up to `until`,
    who has no reason yet, and who backs off.
    """
    places = {"first": first, "after": after, "until": until, "most": most}
    return [QueuedJob(*row) for row in _SOME.run(conn, state=JobState.QUEUED.value, **places)]


def set_pending(conn: Connection, rows: Sequence[tuple[QueuedJob, bytes, EventDraft | None]], now_us: int) -> None:
    """Records why jobs wait, with an event if there is one; nothing where a job has changed since it was read."""
    logs = []
    for job, info, event in rows:
        values: dict[str, Any] = {"job": job.uid, "seen": job.version, "queued": JobState.QUEUED.value, "now": now_us}
        row = _SET_PENDING.run(conn, info=info, count=int(event is not None), **values).first()
        if row is not None and event is not None:
            logs.append((job.uid, row[0], [event]))
    events.insert_logs(conn, logs, now_us)
