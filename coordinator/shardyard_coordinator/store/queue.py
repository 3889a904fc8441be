"""The queue as the scheduling loop reads it: few columns, positions in line, and the reasons of a whole pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, func, literal_column, or_, select, update

from shardyard_coordinator.domain.records import EventDraft, LineJob, QueuedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.store import events, tables
from shardyard_coordinator.store.sql import Prepared

_job = tables.job.c
_FIELDS = tuple(name for name in QueuedJob._fields if name != "position")
# A literal, not a parameter: only then does the database use the partial index `job_line`.
_WAITS = (_job.state == literal_column(f"'{JobState.QUEUED.value}'"), _job.deleted_us == literal_column("0"))
_ORDER = (_job.priority.desc(), _job.id)
_LIGHT = select(*(_job[name] for name in LineJob._fields)).where(*_WAITS).order_by(*_ORDER)
_HEAD = Prepared(_LIGHT.limit(bindparam("most")))
# The largest number that PostgreSQL takes there.
_REST = Prepared(_LIGHT.limit((1 << 31) - 1).offset(bindparam("first")))
# The positions in line, from that index alone: rows are long, and are read only for the chosen jobs.
_LINE = (
    select(
        _job.id,
        _job.not_before_us,
        _job.pending,
        func.row_number().over(order_by=_ORDER).label("position"),
    )
    .where(*_WAITS)
    .subquery()
)
_QUEUED = select(*(_job[name] for name in _FIELDS), _LINE.c.position).join(_LINE, _job.id == _LINE.c.id)
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


def head_of_line(conn: Connection, most: int) -> list[LineJob]:
    """The first waiting jobs."""
    return [LineJob(*row) for row in _HEAD.run(conn, most=most)]


def rest_of_line(conn: Connection, first: int) -> list[LineJob]:
    """All waiting jobs after the `first` ones."""
    return [LineJob(*row) for row in _REST.run(conn, first=first)]


def some_queued(conn: Connection, first: int, after: int, until: int, most: int) -> list[QueuedJob]:
    """At most `most` jobs, in the order of the line: the `first` ones, positions over `after` up to `until`, those
    without a reason yet, and those that back off.
    """
    places = {"first": first, "after": after, "until": until, "most": most}
    return [QueuedJob(*row) for row in _SOME.run(conn, **places)]


def set_pending(conn: Connection, rows: Sequence[tuple[QueuedJob, bytes, EventDraft | None]], now_us: int) -> None:
    """Records why jobs wait, with an event if there is one; skips jobs that have changed since they were read."""
    logs = []
    for job, info, event in rows:
        values: dict[str, Any] = {"job": job.uid, "seen": job.version, "queued": JobState.QUEUED.value, "now": now_us}
        row = _SET_PENDING.run(conn, info=info, count=int(event is not None), **values).first()
        if row is not None and event is not None:
            logs.append((job.uid, row[0], [event]))
    events.insert_logs(conn, logs, now_us)
