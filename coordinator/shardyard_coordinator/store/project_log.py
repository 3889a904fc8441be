"""The event log of a project: the events of all its jobs by their positions in the store, and what was removed of it.

A removal never touches what a webhook still has to deliver, and is noted: a reader whose place is before its end, and
older than it, learns that events are missing instead of skipping them unnoticed.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, delete, func, select

from shardyard_coordinator.domain.records import EventKind, EventRecord, LoggedEvent, Place
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.sql import Prepared, PreparedInsert

_event, _job, _removal, _webhook = tables.event.c, tables.job.c, tables.event_removal.c, tables.webhook.c
_COLUMNS = (
    _event.position,
    _event.job_uid,
    _event.sequence,
    _event.time_us,
    _event.attempt,
    _event.kind,
    _event.payload,
    _job.project,
    _job.job_id,
)
_LOG = select(*_COLUMNS).outerjoin_from(tables.event, tables.job, _job.uid == _event.job_uid)
_AFTER = Prepared(_LOG.where(_event.position > bindparam("after")).order_by(_event.position).limit(bindparam("most")))
_BEFORE = Prepared(
    _LOG.where(_event.position < bindparam("before")).order_by(_event.position.desc()).limit(bindparam("most"))
)
_NEWEST = Prepared(select(func.coalesce(func.max(_event.position), 0)))
_NEWEST_REMOVED = Prepared(select(func.coalesce(func.max(_removal.up_to), 0)))
_NAMES = Prepared(select(_job.project, _job.job_id).where(_job.uid == bindparam("job")))
_LAST_REMOVAL = Prepared(
    select(func.coalesce(func.max(_removal.number), 0)).where(_removal.project == bindparam("project"))
)
_REMOVED_UP_TO = Prepared(
    select(func.coalesce(func.max(_removal.up_to), 0)).where(
        _removal.project == bindparam("project"), _removal.number > bindparam("after")
    )
)
_EXCEEDED = Prepared(
    delete(tables.event_removal).where(_removal.project == bindparam("project"), _removal.up_to <= bindparam("up_to"))
)
_NOTE = PreparedInsert(tables.event_removal, ("project", "number", "up_to"))
_HELD = Prepared(
    select(func.min(_webhook.position)).where(_webhook.project == bindparam("project"), _webhook.holds == 1)
)
_mine = (_event.job_uid == bindparam("job"), _event.position <= bindparam("held"))
_LAST_BELOW = Prepared(select(func.max(_event.position)).where(*_mine, _event.sequence < bindparam("below")))
_first = select(_event.position).where(*_mine).order_by(_event.sequence).limit(bindparam("most")).subquery()
_LAST_OF_FIRST = Prepared(select(func.max(_first.c.position)))
_REMOVE = Prepared(
    delete(tables.event).where(_event.job_uid == bindparam("job"), _event.position <= bindparam("up_to"))
)
END = 1 << 62
"""Beyond every position."""


def log_after(conn: Connection, position: int, limit: int) -> list[LoggedEvent]:
    """At most `limit` events of all projects after a position, in order."""
    return _logged(conn, _AFTER, after=position, most=limit)


def log_before(conn: Connection, position: int, limit: int) -> list[LoggedEvent]:
    """At most `limit` events of all projects before a position, the newest first."""
    return _logged(conn, _BEFORE, before=position, most=limit)


def _logged(conn: Connection, statement: Prepared, **values: int) -> list[LoggedEvent]:
    return [
        LoggedEvent(
            EventRecord(position, uid, sequence, time_us, attempt, EventKind(kind), payload),
            project or "",
            job_id or "",
        )
        for position, uid, sequence, time_us, attempt, kind, payload, project, job_id in statement.run(conn, **values)
    ]


def newest_position(conn: Connection) -> int:
    """The position of the newest event that was ever recorded, of all projects; 0 if there was none."""
    return int(max(_NEWEST.run(conn).scalar_one(), _NEWEST_REMOVED.run(conn).scalar_one()))


def job_names(conn: Connection, uids: frozenset[str]) -> dict[str, tuple[str, str]]:
    """Project and id of each of these jobs that exists, by uid."""
    found = {uid: _NAMES.run(conn, job=uid).first() for uid in uids}
    return {uid: (row[0], row[1]) for uid, row in found.items() if row is not None}


def last_removal(conn: Connection, project: str) -> int:
    """The number of the newest removal from a project's log; 0: nothing was ever removed."""
    return int(_LAST_REMOVAL.run(conn, project=project).scalar_one())


def is_kept(conn: Connection, project: str, place: Place) -> bool:
    """Whether no event after the place was removed since the place was current."""
    up_to = _REMOVED_UP_TO.run(conn, project=project, after=place.removal).scalar_one()
    return bool(up_to <= place.position)


def remove_before(conn: Connection, job_uid: str, below: int) -> None:
    """Removes the events of a job before a sequence, except those that a webhook has to deliver."""
    project = _project(conn, job_uid)
    top = _LAST_BELOW.run(conn, job=job_uid, below=below, held=_held(conn, project)).scalar_one()
    _remove(conn, project, job_uid, top)


def remove_first(conn: Connection, job_uid: str, most: int) -> int:
    """Removes the oldest events of a job, except those that a webhook has to deliver; returns how many."""
    project = _project(conn, job_uid)
    top = _LAST_OF_FIRST.run(conn, job=job_uid, most=most, held=_held(conn, project)).scalar_one()
    return _remove(conn, project, job_uid, top)


def _project(conn: Connection, job_uid: str) -> str:
    row = _NAMES.run(conn, job=job_uid).first()
    return "" if row is None else str(row[0])


def _held(conn: Connection, project: str) -> int:
    """The position up to which every webhook of the project has delivered."""
    position = _HELD.run(conn, project=project).scalar_one()
    return END if position is None else int(position)


def _remove(conn: Connection, project: str, job_uid: str, up_to: int | None) -> int:
    if up_to is None:
        return 0
    number = last_removal(conn, project) + 1
    removed = _REMOVE.run(conn, job=job_uid, up_to=up_to).rowcount
    # A place that is before this removal's end is before theirs too, and older than both.
    _EXCEEDED.run(conn, project=project, up_to=up_to)
    _NOTE.run(conn, [{"project": project, "number": number, "up_to": up_to}])
    return removed
