"""The spans of jobs, made from their events: queue, attempt, launch, phases, first steps.

Events come from the store's commits, so a span is recorded once, by the process that committed its end. A job's trace
context is read from the job when its first event is heard; jobs without one are not traced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.monitoring.tracing import Tracing, checked, end, traceparent_of
from shardyard_coordinator.store import encode, jobs
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
MAX_WAITING = 10_000
MAX_JOBS = 10_000
_HEARD = frozenset({EventKind.STATE, EventKind.ATTEMPT, EventKind.PHASE, EventKind.PROGRESS, EventKind.CANARY})


@dataclass
class _Traced:
    """A job that is traced: its context, and its open spans by name."""

    traceparent: str
    open: dict[str, Span] = field(default_factory=dict)
    phase: str = ""

    def close(self, name: str, at_us: int, *, error: str = "") -> None:
        span = self.open.pop(name, None)
        if span is not None:
            end(span, error=error, end_us=at_us)


class JobSpans:
    """A subscriber of the store; made inside the loop."""

    def __init__(self, store: Store, tracing: Tracing) -> None:
        self._store = store
        self._tracing = tracing
        self._jobs: dict[str, _Traced | None] = {}
        self._waiting: asyncio.Queue[EventRecord] = asyncio.Queue(MAX_WAITING)
        self._unsubscribe = store.subscribe(self._hear)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Takes no more events; spans that are open are lost."""
        self._unsubscribe()
        self._task.cancel()
        await asyncio.wait({self._task})

    def _hear(self, records: Sequence[EventRecord]) -> None:
        for record in records:
            if record.kind in _HEARD and not self._waiting.full():
                self._waiting.put_nowait(record)

    async def _run(self) -> None:
        while True:
            record = await self._waiting.get()
            try:
                traced = await self._traced(record.job_uid)
            except Refused as refused:
                _log.info("an event is not traced: %s", refused)
                continue
            if traced is not None:
                self._take(record, traced)

    async def _traced(self, job_uid: str) -> _Traced | None:
        if job_uid not in self._jobs:
            job = await self._store.read(lambda conn: jobs.get_job_by_uid(conn, job_uid))
            traceparent = checked(encode.job_to_proto(job, full=False).traceparent) if job is not None else ""
            if len(self._jobs) >= MAX_JOBS:
                self._jobs.pop(next(iter(self._jobs)))
            self._jobs[job_uid] = _Traced(traceparent) if traceparent else None
        return self._jobs[job_uid]

    def _take(self, record: EventRecord, traced: _Traced) -> None:
        event = encode.event_to_proto(record)
        match record.kind:
            case EventKind.STATE:
                self._state(event, record, traced)
            case EventKind.ATTEMPT:
                self._attempt(event.attempt_changed.attempt, record, traced)
            case EventKind.PHASE:
                self._phase(event.phase.phase, record, traced)
            case EventKind.CANARY:
                traced.close(traced.phase, record.time_us)
            case EventKind.PROGRESS if event.progress.step >= 1:
                traced.close("first steps", record.time_us)

    def _state(self, event: job_pb2.JobEvent, record: EventRecord, traced: _Traced) -> None:
        state = JobState(job_pb2.State.Name(event.state.to).removeprefix("STATE_"))
        if state is JobState.QUEUED:
            self._open("queue", record, traced, traced.traceparent)
        else:
            traced.close("queue", record.time_us)
        if state.is_terminal:
            failure = event.state.failure.reason if event.state.HasField("failure") else ""
            for name in tuple(traced.open):
                traced.close(name, record.time_us, error=failure)
            self._jobs.pop(record.job_uid, None)

    def _attempt(self, attempt: job_pb2.Attempt, record: EventRecord, traced: _Traced) -> None:
        if attempt.state == job_pb2.Attempt.STATE_STARTING:
            span = self._open("attempt", record, traced, traced.traceparent)
            inside = traceparent_of(span)
            self._open("launch", record, traced, inside)
            self._open("first steps", record, traced, inside)
        elif attempt.state == job_pb2.Attempt.STATE_ACTIVE:
            traced.close("launch", record.time_us)
        elif attempt.state == job_pb2.Attempt.STATE_ENDED:
            error = attempt.failure.reason if attempt.HasField("failure") else ""
            for name in ("launch", traced.phase, "first steps", "attempt"):
                traced.close(name, record.time_us, error=error)

    def _phase(self, phase: str, record: EventRecord, traced: _Traced) -> None:
        """A phase ends where the next one begins."""
        traced.close(traced.phase, record.time_us)
        if (attempt := traced.open.get("attempt")) is not None:
            traced.phase = f"phase: {phase[:64]}"
            self._open(traced.phase, record, traced, traceparent_of(attempt))

    def _open(self, name: str, record: EventRecord, traced: _Traced, parent: str) -> Span:
        span = self._tracing.begin(name, parent, start_us=record.time_us)
        span.set_attribute("shardyard.job_uid", record.job_uid)
        span.set_attribute("shardyard.attempt", record.attempt)
        traced.open[name] = span
        return span
