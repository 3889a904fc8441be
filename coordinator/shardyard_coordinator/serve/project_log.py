"""A project's events after a place, from the ring or the store: for those who follow a project, and for webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from sqlalchemy import Connection

from shardyard_coordinator.domain.errors import FieldViolation, Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import EventRecord, LoggedEvent, Place
from shardyard_coordinator.serve.fanout import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, Fanout
from shardyard_coordinator.serve.tokens import Tokens, cursor_invalid
from shardyard_coordinator.store import project_log
from shardyard_coordinator.store.store import Store

_KIND = "events"
# A message around each event, with its cursor and the job's name.
_AROUND_BYTES = 300
_MAX_NAMES = 50_000


class Batch(NamedTuple):
    """Events of one project, and the place after everything that was looked at, other projects' events too."""

    events: list[LoggedEvent]
    place: Place


class Cursors:
    """Places as opaque texts, of one project each."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def make(self, project: str, place: Place) -> str:
        """The cursor of a place."""
        return self._tokens.make(_KIND, project, place)

    def read(self, project: str, cursor: str, field: str) -> Place:
        """The place of a cursor. Raises: Refused CURSOR_INVALID, with the field."""
        try:
            position, removal = self._tokens.read(_KIND, project, cursor)
        except ValueError:
            raise cursor_invalid(field, cursor) from None
        return Place(int(position), int(removal))

    def require_kept(self, conn: Connection, project: str, place: Place, field: str) -> Place:
        """The same position, current now.

        Raises: Refused CURSOR_EXPIRED if events after it were removed since; CURSOR_AHEAD if there is no such event
        yet, because the store was restored from a backup.
        """
        current = Place(place.position, project_log.last_removal(conn, project))
        if not project_log.is_kept(conn, project, place):
            cursor = self.make(project, current)
            text = f"events after this cursor have been removed; `{cursor}` continues with those that are kept"
            raise _refused(Reason.CURSOR_EXPIRED, text, cursor, field)
        if place.position > project_log.newest_position(conn):
            cursor = self.make(project, newest_place(conn, project))
            text = f"the service's store is older than this cursor; `{cursor}` continues with what happens from now on"
            raise _refused(Reason.CURSOR_AHEAD, text, cursor, field)
        return current


def _refused(reason: Reason, text: str, cursor: str, field: str) -> Refused:
    return Refused(reason, text, metadata={"cursor": cursor}, violations=[FieldViolation(field, text, reason)])


class ProjectLog:
    """Reads batches of a project's log."""

    def __init__(self, store: Store, fanout: Fanout, cursors: Cursors) -> None:
        self.cursors = cursors
        self._store = store
        self._fanout = fanout
        # Names of jobs never change, and a uid is never used again.
        self._names: dict[str, tuple[str, str]] = {}

    async def after(self, project: str, place: Place) -> Batch:
        """The next events after a place, up to a batch. Raises: Refused CURSOR_EXPIRED."""
        records = self._fanout.tail(place.position)
        if records is None:
            return await self._store.read(partial(self._read, project=project, place=place))
        found = await self._named(records[:MAX_BATCH_EVENTS])
        return _fitting(found, project, place.removal) if found else Batch([], place)

    def _read(self, conn: Connection, project: str, place: Place) -> Batch:
        place = self.cursors.require_kept(conn, project, place, "after_cursor")
        found = project_log.log_after(conn, place.position, MAX_BATCH_EVENTS)
        return _fitting(found, project, place.removal) if found else Batch([], place)

    async def _named(self, records: Sequence[EventRecord]) -> list[LoggedEvent]:
        unknown = frozenset(record.job_uid for record in records) - self._names.keys()
        if unknown:
            found = await self._store.read(partial(project_log.job_names, uids=unknown))
            if len(self._names) > _MAX_NAMES:
                self._names.clear()
                return await self._named(records)
            self._names.update(found)
        return [LoggedEvent(record, *self._names.get(record.job_uid, ("", ""))) for record in records]


def newest_place(conn: Connection, project: str) -> Place:
    """The place after everything that is recorded now."""
    return Place(project_log.newest_position(conn), project_log.last_removal(conn, project))


def oldest_place(conn: Connection, project: str) -> Place:
    """The place before everything that is kept now."""
    return Place(0, project_log.last_removal(conn, project))


def _fitting(found: Sequence[LoggedEvent], project: str, removal: int) -> Batch:
    """Those of the project, as many as fit into a message; at least one."""
    size, events = 0, list[LoggedEvent]()
    for logged in found:
        if logged.project != project:
            continue
        size += len(logged.record.payload) + _AROUND_BYTES
        if size > MAX_BATCH_BYTES and events:
            return Batch(events, Place(events[-1].record.position, removal))
        events.append(logged)
    return Batch(events, Place(found[-1].record.position, removal))
