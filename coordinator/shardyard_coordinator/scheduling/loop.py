"""Load → decide → apply: the loop that carries out what the policy decides.

A pass is made when something has changed (a job's state, the cluster) or a back-off ends; each start is a transaction
of its own, guarded by what was read, so a stale decision changes nothing. Why the others wait is told when the reason
changes, not when its numbers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection

from shardyard.v1 import job_pb2
from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.records import AttemptRecord, EventKind, EventRecord, JobRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.launch.protocols import AttemptKey, ClusterView, Launcher
from shardyard_coordinator.scheduling.explain import Waiting, waits
from shardyard_coordinator.scheduling.policy import Policy, Start, admit, free_slots
from shardyard_coordinator.scheduling.snapshot import load_snapshot, slots_of
from shardyard_coordinator.seams import SYSTEM, Clock, Trace
from shardyard_coordinator.store import attempts, encode, events, jobs, listing
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
_WATCH_CLUSTER_S = 2.0
_RETRY_S = 1.0
# Jobs whose numbers are brought up to date in one pass, the first in line first.
_MAX_QUIET = 256


class SchedulingLoop:
    """Starts gangs and hands them to the collector."""

    def __init__(self, store: Store, launcher: Launcher, collector: Collector, clock: Clock, trace: Trace) -> None:
        self._store = store
        self._launcher = launcher
        self._collector = collector
        self._clock = clock
        self._trace = trace
        self._policy = Policy()
        self._hint = asyncio.Event()
        self._seen: ClusterView | None = None
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe = store.subscribe(self._hear)

    def start(self) -> None:
        """Begins; only after recovery, so that every slot that is held is known."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops; what was decided and recorded stands."""
        self._unsubscribe()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def cluster_slots(self) -> tuple[int, int]:
        """All slots of the cluster, and those that no gang holds."""
        view = await self._launcher.cluster()
        live = await self._store.read(attempts.live_attempts)
        snapshot = load_snapshot((), live, view, self._clock.now_us())
        return sum(slots_of(node) for node in view.nodes), sum(free_slots(snapshot).values())

    async def step(self) -> float | None:
        """One pass; answers the seconds until the next back-off ends, None where nobody backs off."""
        view = await self._launcher.cluster()
        self._seen = view
        queued, live = await self._store.read(_load)
        if not queued:
            return None
        now_us = self._clock.now_us()
        snapshot = load_snapshot(queued, live, view, now_us)
        now = now_us // 1_000_000
        starts, waiting = admit(snapshot, now, self._policy)
        self._trace.point("decide.done")
        by_uid = {job.uid: job for job in queued}
        for start in starts:
            await self._apply(by_uid[start.job], start, view)
        await self._tell(by_uid, waits(snapshot, waiting, now))
        ends = [blocked.until for _, blocked in waiting if blocked.until]
        return max(min(ends) - self._clock.now_us() / 1e6, 0.0) if ends else None

    async def _apply(self, job: JobRecord, start: Start, view: ClusterView) -> None:
        def record(conn: Connection) -> None:
            attempts.start_attempt(
                conn,
                job,
                start.placement,
                cluster_id=view.cluster_id,
                export_uid=uuid.uuid4().hex,
                now_us=self._clock.now_us(),
            )

        try:
            await self._store.write(record, SYSTEM)
        except StaleWrite as stale:
            _log.info("%s", stale)
            return
        self._trace.point("attempt.recorded")
        self._collector.follow(AttemptKey(start.job, start.epoch))

    async def _tell(self, by_uid: Mapping[str, JobRecord], waiting: Mapping[str, Waiting]) -> None:
        """Records why jobs wait: with an event where the reason is another one, without where its numbers are."""
        changed = {uid: info for uid, wait in waiting.items() if (info := _pending_info(wait)) != _held(by_uid[uid])}
        told = {uid: info for uid, info in changed.items() if info.constraint != _held(by_uid[uid]).constraint}
        quiet = {uid: info for uid, info in changed.items() if uid not in told}
        if not changed:
            return

        def record(conn: Connection) -> None:
            for uid, info in [*told.items(), *list(quiet.items())[:_MAX_QUIET]]:
                _record_pending(conn, uid, info, self._clock.now_us())

        await self._store.write(record, SYSTEM)

    async def _run(self) -> None:
        while True:
            try:
                pause_s = await self.step()
            except Refused as refused:
                pause_s = refused.retry_after_s or _RETRY_S
            except Exception:  # The edge of a supervised loop: a defect must not end the queue.
                _log.exception("a scheduling pass failed; it is made again")
                pause_s = _RETRY_S
            await self._wait(pause_s)

    async def _wait(self, pause_s: float | None) -> None:
        """Until something has changed: the store says so, the cluster is asked now and then."""
        ends_s = None if pause_s is None else self._clock.monotonic_s() + pause_s
        while True:
            left = _WATCH_CLUSTER_S if ends_s is None else min(ends_s - self._clock.monotonic_s(), _WATCH_CLUSTER_S)
            # Not wait_for: on Python 3.11 it can swallow a cancellation that comes with the hint.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left, 0.01)):
                    await self._hint.wait()
            if self._hint.is_set():
                self._hint.clear()
                return
            if ends_s is not None and self._clock.monotonic_s() >= ends_s:
                return
            if await self._launcher.cluster() != self._seen:
                return

    def _hear(self, records: Sequence[EventRecord]) -> None:
        if any(record.kind is EventKind.STATE for record in records):
            self._hint.set()


def _load(conn: Connection) -> tuple[list[JobRecord], list[AttemptRecord]]:
    return listing.jobs_in(conn, JobState.QUEUED), attempts.live_attempts(conn)


def _held(job: JobRecord) -> job_pb2.PendingInfo:
    return job_pb2.PendingInfo.FromString(job.pending)


def _pending_info(wait: Waiting) -> job_pb2.PendingInfo:
    return job_pb2.PendingInfo(
        constraint=job_pb2.PendingInfo.Constraint.Value(f"CONSTRAINT_{wait.constraint.value}"),
        message=wait.message,
        needed_slots=wait.needed_slots,
        free_slots=wait.free_slots,
        position=wait.position,
        until=Timestamp(seconds=wait.until) if wait.until else None,
    )


def _record_pending(conn: Connection, uid: str, info: job_pb2.PendingInfo, now_us: int) -> None:
    job = jobs.get_job_by_uid(conn, uid)
    if job is None or job.state is not JobState.QUEUED or _held(job) == info:
        return
    jobs.change_job(conn, uid, now_us, {"pending": info.SerializeToString()})
    if _held(job).constraint == info.constraint:
        return
    events.append(conn, uid, [encode.draft(EventKind.PENDING, job_pb2.JobEvent(pending=info))], now_us)
