"""LogService: what the ranks wrote, from the files of the attempts; needs no Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from sqlalchemy import Connection

from shardyard.v1 import log_service_pb2 as pb
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import AttemptState
from shardyard_coordinator.serve import logfiles
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.fanout import Fanout, logs_of
from shardyard_coordinator.serve.logfiles import Chosen
from shardyard_coordinator.serve.loglooks import LogLooks
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import cursor_invalid
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store import attempts, jobs


class LogService:
    """What the ranks of a job wrote."""

    full_name = "shardyard.v1.LogService"

    def __init__(self, parts: Parts, fanout: Fanout, intervals: Intervals) -> None:
        self._parts = parts
        self._fanout = fanout
        self._intervals = intervals
        self._looks = LogLooks(fanout, intervals.poll_s)

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"TailLogs": self.tail}

    async def tail(self, request: pb.TailLogsRequest, _call: Call) -> AsyncIterator[pb.TailLogsResponse]:
        """Batches of lines; with `follow`, until the job has ended and all is read."""
        name = self._parts.name("job", request.name)
        job = await self._parts.store.read(lambda conn: jobs.get_job(conn, name.project, name.id))
        chosen = _chosen(request, job)
        folder = self._parts.storage / "jobs" / job.uid
        offsets = self._offsets(request, job.uid)
        if request.tail_lines and not request.cursor:
            found = await asyncio.to_thread(logfiles.sources, folder, chosen)
            offsets = await asyncio.to_thread(logfiles.tail_offsets, found, request.tail_lines)
        with self._looks.following(job.uid, folder) if request.follow else contextlib.nullcontext():
            async for answer in self._batches(request, job.uid, folder, chosen, offsets=offsets):
                yield answer

    async def _batches(
        self, request: pb.TailLogsRequest, job_uid: str, folder: Path, chosen: Chosen, *, offsets: dict[str, int]
    ) -> AsyncIterator[pb.TailLogsResponse]:
        """Looks when the job changes, its files grow, or a heartbeat is due; it does not poll."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._intervals.heartbeat_s
        while True:
            with self._fanout.interest(job_uid, logs_of(job_uid)) as waiter:
                ended, whole = await self._parts.store.read(lambda conn: _ended(conn, job_uid))
                found = await asyncio.to_thread(logfiles.sources, folder, chosen)
                before = offsets
                lines, offsets = await asyncio.to_thread(
                    logfiles.read, found, before, chosen, whole=None if ended else whole
                )
                if lines or loop.time() >= due_s:
                    cursor = self._parts.tokens.make("logs", job_uid, offsets)
                    yield pb.TailLogsResponse(lines=lines, cursor=cursor)
                    due_s = loop.time() + self._intervals.heartbeat_s
                elif offsets != before:
                    continue  # All lines read were below the requested level; there may be more.
                elif ended or not request.follow:
                    return
                else:
                    await self._fanout.changed(waiter, due_s - loop.time())

    def _offsets(self, request: pb.TailLogsRequest, job_uid: str) -> dict[str, int]:
        if not request.cursor:
            return {}
        try:
            return dict(self._parts.tokens.read("logs", job_uid, request.cursor))
        except ValueError:
            raise cursor_invalid("cursor", request.cursor) from None


def _chosen(request: pb.TailLogsRequest, job: JobRecord) -> Chosen:
    """The requested lines; Refused if the job has no such rank or attempt."""
    found = []
    if request.HasField("rank") and request.rank >= job.workers:
        text = f"`{request.rank}`: the gang has ranks 0 to {job.workers - 1}; give one of them, or leave it out for all"
        found.append(FieldViolation("rank", text))
    if request.HasField("attempt") and request.attempt > job.epoch:
        there = f"attempts 1 to {job.epoch}" if job.epoch else "no attempt yet"
        text = f"`{request.attempt}`: the job has {there}; give one that it has, or leave it out for all"
        found.append(FieldViolation("attempt", text))
    if found:
        raise refused_fields(found)
    return Chosen(
        rank=request.rank if request.HasField("rank") else None,
        attempt=request.attempt if request.HasField("attempt") else None,
        min_level=int(request.min_level),
    )


def _ended(conn: Connection, job_uid: str) -> tuple[bool, frozenset[int]]:
    """Whether the job has ended, and the attempts that have. Read it before the files, so that no line is missed."""
    job = jobs.get_job_by_uid(conn, job_uid)
    live = {
        each.epoch for each in attempts.list_attempts(conn, job_uid, limit=1000) if each.state is not AttemptState.ENDED
    }
    epochs = range(1, (job.epoch if job else 0) + 1)
    return job is None or job.state.is_terminal, frozenset(epochs) - live
