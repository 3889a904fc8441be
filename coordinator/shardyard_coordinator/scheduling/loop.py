"""Load → decide → apply: the loop that carries out what the policy decides.

A pass is made when something has changed (a job's state, the cluster) or a back-off ends; each start is a transaction
of its own, guarded by what was read, so a stale decision changes nothing. Why the others wait is told when the reason
changes, not when its numbers do.

A long queue must not cost those who submit to it. So a pass decides in a thread of the readers, the loop rests after it
in proportion to the time that it took, a pass tells so many reasons and no more, and where nothing is free it looks at
those alone whose reasons may have to be told; every few seconds at all the others too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection

from shardyard.v1 import job_pb2
from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.records import EventDraft, EventKind, EventRecord, QueuedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.launch.protocols import AttemptKey, ClusterView, Launcher
from shardyard_coordinator.scheduling.explain import Waiting, waits
from shardyard_coordinator.scheduling.policy import Policy, Start, admit, free_slots
from shardyard_coordinator.scheduling.snapshot import load_snapshot, slots_of
from shardyard_coordinator.seams import SYSTEM, Clock, Trace
from shardyard_coordinator.store import attempts, encode, jobs, queue
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
_WATCH_CLUSTER_S = 2.0
_RETRY_S = 1.0
# Jobs whose numbers are brought up to date in one pass, the first in line first; and whose reasons are told.
_MAX_QUIET = 256
_MAX_TOLD = 256
_ROWS_A_WRITE = 16
TELL_ON_S = 0.2
_LOOK_AT_ALL_S = 10.0
# A pass takes at most a tenth of the time.
_REST = 9.0
_MAX_REST_S = 1.0


@dataclass(frozen=True)
class _Pass:
    """What one pass has decided; `untold` and `unseen` say that it left out some."""

    starts: tuple[tuple[QueuedJob, Start], ...]
    reasons: tuple[tuple[QueuedJob, job_pb2.PendingInfo, bool], ...]
    ends: float | None
    untold: bool
    unseen: bool


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
        self._all_due_s = 0.0
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
        """One pass; answers the seconds until the next one is due by itself, None where none is."""
        view = await self._launcher.cluster()
        whole = view != self._seen or self._clock.monotonic_s() >= self._all_due_s
        self._seen = view
        look = partial(_look, view=view, now_us=self._clock.now_us(), policy=self._policy, whole=whole)
        made = await self._store.read(look)
        if made is None:
            return None
        self._trace.point("decide.done")
        for job, start in made.starts:
            await self._apply(job, start, view)
        await self._tell(made)
        return self._due(made, whole=whole)

    def _due(self, made: _Pass, *, whole: bool) -> float | None:
        now_s = self._clock.monotonic_s()
        if whole:
            self._all_due_s = now_s if made.untold else now_s + _LOOK_AT_ALL_S
        due = [max(made.ends - self._clock.now_us() / 1e6, 0.0)] if made.ends is not None else []
        if made.untold:
            due.append(TELL_ON_S)
        if made.unseen:
            due.append(max(self._all_due_s - now_s, TELL_ON_S))
        return min(due, default=None)

    async def _apply(self, queued: QueuedJob, start: Start, view: ClusterView) -> None:
        def record(conn: Connection) -> None:
            job = jobs.get_job_by_uid(conn, queued.uid)
            if job is None or job.state is not JobState.QUEUED or job.epoch != queued.epoch:
                raise StaleWrite(f"job {queued.uid} is no longer queued after attempt {queued.epoch}")
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

    async def _tell(self, made: _Pass) -> None:
        """Records why jobs wait: with an event where the reason is another one, without where its numbers are."""
        if not made.reasons:
            return
        rows = []
        for job, info, is_new in made.reasons:
            event = encode.draft(EventKind.PENDING, job_pb2.JobEvent(pending=info)) if is_new else None
            rows.append((job, info.SerializeToString(), event))
        # A few at a time: callers who submit meanwhile wait for one such write at most.
        for first in range(0, len(rows), _ROWS_A_WRITE):
            some = rows[first : first + _ROWS_A_WRITE]
            await self._store.write(partial(_record, rows=some, now_us=self._clock.now_us()), SYSTEM)

    async def _run(self) -> None:
        while True:
            begun_s = time.monotonic()
            try:
                pause_s = await self.step()
            except Refused as refused:
                pause_s = refused.retry_after_s or _RETRY_S
            except Exception:  # The edge of a supervised loop: a defect must not end the queue.
                _log.exception("a scheduling pass failed; it is made again")
                pause_s = _RETRY_S
            await asyncio.sleep(min((time.monotonic() - begun_s) * _REST, _MAX_REST_S))
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


def _look(conn: Connection, view: ClusterView, now_us: int, policy: Policy, *, whole: bool) -> _Pass | None:
    """Loads and decides; None where nobody waits."""
    live = attempts.live_attempts(conn)
    whole = whole or any(free_slots(load_snapshot((), live, view, now_us)).values())
    most = 2 * _MAX_QUIET + _MAX_TOLD
    queued = queue.all_queued(conn) if whole else queue.some_queued(conn, _MAX_QUIET, most)
    if not queued:
        return None
    now = now_us // 1_000_000
    starts, waiting = admit(load_snapshot(queued, live, view, now_us), now, policy)
    by_uid = {job.uid: job for job in queued}
    positions = {job.uid: job.position for job in queued}
    told, quiet = [], []
    for uid, wait in waits(waiting, positions, now).items():
        job, info = by_uid[uid], _pending_info(wait)
        held = job_pb2.PendingInfo.FromString(job.pending or b"")
        if info.constraint != held.constraint:
            told.append((job, info, True))
        elif info != held:
            quiet.append((job, info, False))
    return _Pass(
        starts=tuple((by_uid[start.job], start) for start in starts),
        reasons=(*told[:_MAX_TOLD], *quiet[:_MAX_QUIET]),
        ends=min((blocked.until for _, blocked in waiting if blocked.until), default=None),
        untold=len(told) > _MAX_TOLD,
        unseen=not whole and len(queued) >= _MAX_QUIET,
    )


def _record(conn: Connection, rows: Sequence[tuple[QueuedJob, bytes, EventDraft | None]], now_us: int) -> None:
    for job, info, event in rows:
        queue.set_pending(conn, job, info, event, now_us)


def _pending_info(wait: Waiting) -> job_pb2.PendingInfo:
    return job_pb2.PendingInfo(
        constraint=job_pb2.PendingInfo.Constraint.Value(f"CONSTRAINT_{wait.constraint.value}"),
        message=wait.message,
        needed_slots=wait.needed_slots,
        free_slots=wait.free_slots,
        position=wait.position,
        until=Timestamp(seconds=wait.until) if wait.until else None,
    )
