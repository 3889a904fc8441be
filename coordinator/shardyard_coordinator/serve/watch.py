"""WatchJob: every event after a cursor, without a gap, until the job has ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

from google.protobuf import duration_pb2
from sqlalchemy import Connection

from shardyard.v1 import job_service_pb2
from shardyard_coordinator.domain.errors import FieldViolation, Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.fanout import Entry, Fanout
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.store import encode, events, jobs


@dataclass(frozen=True)
class Intervals:
    """Seconds; tests shorten them. `load_s_per_watcher` widens the interval with the number of watchers."""

    heartbeat_s: float = 15.0
    least_s: float = 0.05
    most_s: float = 10.0
    load_s_per_watcher: float = 0.0001
    poll_s: float = 0.5


class Watcher:
    """Serves WatchJob."""

    def __init__(self, parts: Parts, fanout: Fanout, intervals: Intervals) -> None:
        self._parts = parts
        self._fanout = fanout
        self._intervals = intervals
        self._watching = 0
        self._rng = random.Random()

    async def watch(self, request: job_service_pb2.WatchJobRequest, call: Call) -> AsyncIterator[bytes]:
        """Sends encoded WatchJobResponses; ends after the batch with the terminal event."""
        name, mark = self._parts.name("job", request.name), self._fanout.mark()
        job = await self._parts.store.read(lambda conn: _find(conn, name.project, name.id, request))
        self._watching += 1
        try:
            async for batch in self._batches(job, request, mark):
                yield batch
        finally:
            self._watching -= 1

    async def _batches(
        self, job: JobRecord, request: job_service_pb2.WatchJobRequest, mark: int
    ) -> AsyncIterator[bytes]:
        cursor, kinds = request.after_sequence, frozenset(int(kind) for kind in request.kinds)
        interval_s = self._interval(request)
        first = job_service_pb2.WatchJobResponse(job_uid=job.uid, min_interval=_duration(interval_s))
        if request.include_snapshot:
            first.snapshot.CopyFrom(encode.job_to_proto(job))
        head = first.SerializeToString()
        ended, known = job.state.is_terminal, job.last_sequence
        while True:
            with self._fanout.interest(job.uid) as waiter:
                known = max(known, self._fanout.latest(job.uid), cursor + self._fanout.lapped(mark))
                mark = self._fanout.mark()
                if known <= cursor and not head:
                    if ended:
                        return
                    if await self._fanout.changed(waiter, self._intervals.heartbeat_s):
                        known = max(known + 1, self._fanout.latest(job.uid))
                        await asyncio.sleep(0)
                        continue
            entries = await self._fanout.after(job.uid, cursor) if known > cursor else []
            _check_gap(entries, cursor)
            ended = ended or any(entry.is_terminal for entry in entries)
            last = entries[-1].record.sequence if entries else cursor
            yield _encode(head, entries, kinds, cursor, last)
            head, cursor, known = b"", last, known if entries else cursor
            if not (ended and known <= cursor):
                await asyncio.sleep(interval_s * self._rng.uniform(1.0, 1.1))

    def _interval(self, request: job_service_pb2.WatchJobRequest) -> float:
        limits = self._intervals
        asked = request.min_interval.seconds + request.min_interval.nanos / 1e9
        least = max(limits.least_s, self._watching * limits.load_s_per_watcher)
        return min(max(asked, least), limits.most_s)


def _find(conn: Connection, project: str, job_id: str, request: job_service_pb2.WatchJobRequest) -> JobRecord:
    """The job, also a deleted one that the caller knows by uid; Refused if the cursor does not belong to it."""
    try:
        job = jobs.get_job(conn, project, job_id)
    except Refused:
        known = jobs.get_job_by_uid(conn, request.job_uid) if request.job_uid else None
        if known is None or (known.project, known.job_id) != (project, job_id):
            raise
        job = known
    if request.job_uid and request.job_uid != job.uid:
        text = f"`{request.name}` is another job now, of uid {job.uid}; watch it from sequence 0, without job_uid"
        raise Refused(Reason.JOB_REPLACED, text, metadata={"uid": job.uid})
    after = request.after_sequence
    if after > job.last_sequence:
        text = f"{after} is beyond the last event, {job.last_sequence}; continue from at most that"
        raise Refused(
            Reason.CURSOR_AHEAD,
            text,
            metadata={"last": str(job.last_sequence)},
            violations=[FieldViolation("after_sequence", text, Reason.CURSOR_AHEAD)],
        )
    oldest = events.oldest_sequence(conn, job.uid)
    if after < job.last_sequence and not 0 < oldest <= after + 1:
        raise _expired(after, oldest or job.last_sequence + 1)
    return job


def _check_gap(entries: list[Entry], cursor: int) -> None:
    if entries and entries[0].record.sequence != cursor + 1:
        raise _expired(cursor, entries[0].record.sequence)


def _expired(after: int, oldest: int) -> Refused:
    text = f"events after {after} have expired; the oldest kept is {oldest}; continue from {oldest - 1}"
    return Refused(
        Reason.CURSOR_EXPIRED,
        text,
        metadata={"oldest_sequence": str(oldest)},
        violations=[FieldViolation("after_sequence", text, Reason.CURSOR_EXPIRED)],
    )


def _encode(head: bytes, entries: list[Entry], kinds: frozenset[int], cursor: int, last: int) -> bytes:
    """Concatenated messages of one type are their merge, so each event is encoded once for all watchers."""
    span = job_service_pb2.WatchJobResponse(after_sequence=cursor, last_sequence=last).SerializeToString()
    chosen = (entry.data for entry in entries if not kinds or entry.record.kind in kinds)
    return head + span + b"".join(chosen)


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration
