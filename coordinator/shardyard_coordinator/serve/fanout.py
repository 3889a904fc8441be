"""Events on their way to watchers: a cursor per watcher over one ring and the store.

The ring is fed after each commit, never before. A watcher has no queue: after each write it continues from its cursor,
in the ring if that reaches back far enough, else in the store. So a slow reader costs the others nothing. An event is
encoded once for all watchers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from shardyard.v1 import job_pb2, job_service_pb2
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.store import encode, events
from shardyard_coordinator.store.store import Store

MAX_BATCH_EVENTS = 1000
MAX_BATCH_BYTES = 1024 * 1024
_TERMINAL = frozenset({job_pb2.STATE_SUCCEEDED, job_pb2.STATE_FAILED, job_pb2.STATE_CANCELLED})


EVERY_JOB = "*"
"""The key that is woken when any job has a new event."""
# Of the ring, that many are looked through for the events after a position; more are read from the store.
_MAX_TAIL = 1000


def webhook_of(webhook_uid: str) -> str:
    """The key that is woken when a webhook was changed."""
    return f"{webhook_uid}/webhook"


def metrics_of(job_uid: str) -> str:
    """The key that is woken when a job has new metrics."""
    return f"{job_uid}/metrics"


def logs_of(job_uid: str) -> str:
    """The key that is woken when a job has new log lines."""
    return f"{job_uid}/logs"


class Entry:
    """An event of the ring, encoded when the first watcher asks for it."""

    __slots__ = ("_data", "_terminal", "record")

    def __init__(self, record: EventRecord) -> None:
        self.record = record
        self._data: bytes | None = None
        self._terminal = False

    @property
    def data(self) -> bytes:
        """A WatchJobResponse with only this event: appended to another response, it adds the event to it."""
        if self._data is None:
            event = encode.event_to_proto(self.record)
            self._terminal = event.WhichOneof("payload") == "state" and event.state.to in _TERMINAL
            self._data = job_service_pb2.WatchJobResponse(events=[event]).SerializeToString()
        return self._data

    @property
    def is_terminal(self) -> bool:
        """Whether the job ended with this event."""
        return self.record.kind is EventKind.STATE and bool(self.data) and self._terminal


class Fanout:
    """The ring, and the waiters of each job."""

    def __init__(self, store: Store, *, ring_size: int = 32_768) -> None:
        self._store = store
        self._ring: deque[Entry] = deque()
        self._ring_size = ring_size
        self._jobs: dict[str, deque[Entry]] = {}
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._fed = 0
        self.draining = False
        self._unsubscribe = [store.subscribe(self._feed), store.subscribe_metrics(self._grown)]

    def drain(self) -> None:
        """Wakes all waiters: the service is about to stop."""
        self.draining = True
        for waiters in self._waiting.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def close(self) -> None:
        """Takes no more events. Idempotent."""
        while self._unsubscribe:
            self._unsubscribe.pop()()

    def _grown(self, job_uids: frozenset[str]) -> None:
        for uid in job_uids:
            self.wake(metrics_of(uid))

    def _feed(self, records: Sequence[EventRecord]) -> None:
        for record in records:
            entry = Entry(record)
            self._ring.append(entry)
            self._fed += 1
            self._jobs.setdefault(record.job_uid, deque()).append(entry)
            self.wake(record.job_uid)
        self.wake(EVERY_JOB)
        while len(self._ring) > self._ring_size:
            oldest = self._ring.popleft().record.job_uid
            own = self._jobs[oldest]
            own.popleft()
            if not own:
                del self._jobs[oldest]

    def wake(self, key: str) -> None:
        """Wakes the waiters of a key: a job's uid, or a key of `metrics_of` or `logs_of`."""
        for waiter in self._waiting.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    @contextlib.contextmanager
    def interest(self, *keys: str) -> Iterator[asyncio.Future[None]]:
        """A future that is done at the next event of a job, or the next wake of another key. Take it before looking, so
        that nothing is missed.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for key in keys:
            self._waiting.setdefault(key, set()).add(waiter)
        try:
            yield waiter
        finally:
            for key in keys:
                waiting = self._waiting.get(key)
                if waiting is not None:
                    waiting.discard(waiter)
                    if not waiting:
                        del self._waiting[key]

    async def changed(self, waiter: asyncio.Future[None], timeout_s: float) -> bool:
        """Waits for an interest; returns whether there was an event."""
        done, _ = await asyncio.wait({waiter}, timeout=max(timeout_s, 0))
        return bool(done)

    def latest(self, job_uid: str) -> int:
        """The newest sequence in the ring; 0: the ring has none of the job."""
        own = self._jobs.get(job_uid)
        return own[-1].record.sequence if own else 0

    def mark(self) -> int:
        """The position of the ring, for `lapped`; take it before looking."""
        return self._fed

    def lapped(self, mark: int) -> bool:
        """Whether the ring was refilled since the mark: newer events of a job may then be in the store only."""
        return self._fed - mark > self._ring_size

    def tail(self, position: int) -> list[EventRecord] | None:
        """The events of all jobs after a position in the store, in order; None if the ring may not have them all."""
        found: list[EventRecord] = []
        for entry in islice(reversed(self._ring), _MAX_TAIL):
            if entry.record.position <= position:
                return found[::-1]
            found.append(entry.record)
        return None

    async def after(self, job_uid: str, cursor: int) -> list[Entry]:
        """The next events after the cursor, in order, at most a batch; expired events before them are missing."""
        own = self._jobs.get(job_uid)
        if own is not None and own[0].record.sequence <= cursor + 1:
            start = cursor + 1 - own[0].record.sequence
            return fitting(list(islice(own, start, start + MAX_BATCH_EVENTS)))
        found = await self._store.read(lambda conn: events.events_after(conn, job_uid, cursor, MAX_BATCH_EVENTS))
        return fitting([Entry(record) for record in found])


def fitting(entries: list[Entry]) -> list[Entry]:
    """The first entries, as many as fit into a batch; at least one."""
    size = 0
    for at, entry in enumerate(entries):
        size += len(entry.data)
        if size > MAX_BATCH_BYTES and at:
            return entries[:at]
    return entries
