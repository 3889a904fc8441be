"""EventService: the events of all jobs of a project, as pages and as they come."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from google.protobuf import duration_pb2
from sqlalchemy import Connection

from shardyard.v1 import event_service_pb2 as pb
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.records import LoggedEvent, Place
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.fanout import EVERY_JOB, MAX_BATCH_EVENTS, Fanout
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.project_log import ProjectLog, newest_place, oldest_place
from shardyard_coordinator.serve.tokens import MAX_PAGE_BYTES, Pages
from shardyard_coordinator.serve.validation.text import show
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store import encode, project_log

# A page looks through so many events of all projects at most: those of a quiet project may be far apart.
_MAX_LOOKED_AT = 20_000


class _Page(NamedTuple):
    """Events in the order of a list, where the next page begins, and whether there is one."""

    events: list[LoggedEvent]
    place: Place
    has_more: bool


class EventService:
    """Every job of a project on one cursor."""

    full_name = "shardyard.v1.EventService"

    def __init__(self, parts: Parts, log: ProjectLog, fanout: Fanout, intervals: Intervals) -> None:
        self._parts = parts
        self._log = log
        self._fanout = fanout
        self._intervals = intervals
        self._rng = random.Random()

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"ListEvents": self.list, "WatchEvents": self.watch}

    async def list(self, request: pb.ListEventsRequest, _call: Call) -> pb.ListEventsResponse:
        """Lists a page of events, which ends at its count, at 1 MiB, or after 20,000 events of other projects."""
        project = self._parts.name("project", request.parent).project
        desc = _is_descending(request)
        pages = Pages(self._parts.tokens, "project-events", request)
        token = pages.after()
        cursors, kinds = self._log.cursors, frozenset(int(kind) for kind in request.kinds)
        given = cursors.read(project, request.after_cursor, "after_cursor") if request.after_cursor else None

        def query(conn: Connection) -> _Page:
            if token is not None:
                start = Place(*token)
            elif given is not None:
                start = cursors.require_kept(conn, project, given, "after_cursor")
            else:
                start = oldest_place(conn, project)
            if not desc:
                return _upwards(conn, project, kinds, start, pages.size)
            floor = given.position if given is not None else 0
            before = start.position if token is not None else project_log.END
            return _downwards(conn, project, kinds, Place(before, start.removal), floor=floor, count=pages.size)

        page = await self._parts.store.read_many(query)
        return pb.ListEventsResponse(
            events=[self._event(project, each, page.place.removal) for each in page.events],
            next_page_token=pages.token(page.place) if page.has_more else "",
            cursor="" if desc else cursors.make(project, page.place),
        )

    async def watch(self, request: pb.WatchEventsRequest, _call: Call) -> AsyncIterator[pb.WatchEventsResponse]:
        """Sends batches as they come, and a heartbeat when nothing does; never ends by itself."""
        project = self._parts.name("project", request.parent).project
        place = await self._start(request, project)
        kinds, interval_s = frozenset(int(kind) for kind in request.kinds), self._interval_s(request)
        cursor = request.after_cursor or self._log.cursors.make(project, place)
        answer = pb.WatchEventsResponse()
        answer.min_interval.FromMicroseconds(round(interval_s * 1e6))
        loop = asyncio.get_running_loop()
        due_s = loop.time()  # The first answer comes at once.
        while True:
            with self._fanout.interest(EVERY_JOB) as waiter:
                batch = await self._log.after(project, place)
                is_quiet = batch.place.position == place.position
                place = batch.place
                events = [each for each in batch.events if not kinds or each.record.kind in kinds]
                if is_quiet and loop.time() < due_s:
                    await self._fanout.changed(waiter, due_s - loop.time())
            if events or loop.time() >= due_s:
                answer.after_cursor, cursor = cursor, self._log.cursors.make(project, place)
                answer.cursor = cursor
                answer.events.extend(self._event(project, each, place.removal) for each in events)
                yield answer
                answer, due_s = pb.WatchEventsResponse(), loop.time() + self._intervals.heartbeat_s
            # Also without an answer: many commits of other projects cost one look.
            await asyncio.sleep(interval_s * self._rng.uniform(1.0, 1.1))

    async def _start(self, request: pb.WatchEventsRequest, project: str) -> Place:
        cursors, store = self._log.cursors, self._parts.store
        if request.after_cursor:
            given = cursors.read(project, request.after_cursor, "after_cursor")
            kept = partial(cursors.require_kept, project=project, place=given, field="after_cursor")
            return await store.read(kept)
        return await store.read(partial(newest_place if request.from_now else oldest_place, project=project))

    def _event(self, project: str, logged: LoggedEvent, removal: int) -> pb.ProjectEvent:
        cursor = self._log.cursors.make(project, Place(logged.record.position, removal))
        return encode.project_event_to_proto(logged, cursor)

    def _interval_s(self, request: pb.WatchEventsRequest) -> float:
        asked: duration_pb2.Duration = request.min_interval
        asked_s = asked.seconds + asked.nanos / 1e9
        return min(max(asked_s, self._intervals.least_s), self._intervals.most_s)


def _is_descending(request: Any) -> bool:
    words = request.order_by.split()
    if words and (words[0] != "time" or words[1:] not in ([], ["asc"], ["desc"])):
        rule = f"{show(request.order_by)} is not an order; use `time`, the oldest first, or `time desc`"
        raise refused_fields([FieldViolation("order_by", rule)])
    return bool(words[1:] == ["desc"])


def _upwards(conn: Connection, project: str, kinds: frozenset[int], place: Place, count: int) -> _Page:
    """A page after a place, the oldest first."""
    found: list[LoggedEvent] = []
    size = 0
    for _ in range(_MAX_LOOKED_AT // MAX_BATCH_EVENTS):
        rows = project_log.log_after(conn, place.position, MAX_BATCH_EVENTS)
        for logged in rows:
            if _is_wanted(logged, project, kinds):
                size += len(logged.record.payload)
                if len(found) == count or (size > MAX_PAGE_BYTES and found):
                    return _Page(found, place, True)
                found.append(logged)
            place = Place(logged.record.position, place.removal)
        if len(rows) < MAX_BATCH_EVENTS:
            return _Page(found, place, False)
    return _Page(found, place, True)


def _downwards(conn: Connection, project: str, kinds: frozenset[int], place: Place, *, floor: int, count: int) -> _Page:
    """A page before a place and after the position `floor`, the newest first."""
    found: list[LoggedEvent] = []
    size = 0
    for _ in range(_MAX_LOOKED_AT // MAX_BATCH_EVENTS):
        rows = project_log.log_before(conn, place.position, MAX_BATCH_EVENTS)
        for logged in rows:
            if logged.record.position <= floor:
                return _Page(found, place, False)
            if _is_wanted(logged, project, kinds):
                size += len(logged.record.payload)
                if len(found) == count or (size > MAX_PAGE_BYTES and found):
                    return _Page(found, place, True)
                found.append(logged)
            place = Place(logged.record.position, place.removal)
        if len(rows) < MAX_BATCH_EVENTS:
            return _Page(found, place, False)
    return _Page(found, place, True)


def _is_wanted(logged: LoggedEvent, project: str, kinds: frozenset[int]) -> bool:
    return logged.project == project and (not kinds or logged.record.kind in kinds)
