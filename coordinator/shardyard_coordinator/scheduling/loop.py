"""Load → decide → apply: the loop that carries out what the policy decides.

A pass is made when something has changed (a job's state, the cluster) or a back-off ends. It first starts jobs that
fit: it reads the head of the line, and the rest only while slots are left; it decides after its read has ended, so
that no snapshot of the store stays open; each start is a separate transaction, guarded by the values that were read, so
a stale decision changes nothing. Then it explains why the others wait: an event when the reason changes, not when its
numbers do.

A long queue must not slow down submissions. So a pass decides in a thread, and the loop rests after it in proportion to
the time that it took; explaining has its own rest, so that free slots do not wait for it. It writes a limited number of
reasons: of the first jobs in line, of jobs without a reason, and of a moving stretch of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection

from shardyard.v1 import job_pb2
from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.records import EventDraft, EventKind, EventRecord, HeldSlots, LineJob, QueuedJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.launch.protocols import AttemptKey, ClusterView, Launcher
from shardyard_coordinator.scheduling.explain import Waiting, waits
from shardyard_coordinator.scheduling.policy import Admission, Blocked, PendingJob, Policy, Start, admit, free_slots
from shardyard_coordinator.scheduling.snapshot import load_snapshot, pending_jobs, slots_of
from shardyard_coordinator.seams import SYSTEM, Clock, Trace
from shardyard_coordinator.store import attempts, encode, jobs, queue
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
_WATCH_CLUSTER_S = 2.0
_RETRY_S = 1.0
# The number of jobs that are read first: usually they take all free slots.
_HEAD = 512
# The first jobs in line, whose numbers every pass updates; how many others a pass examines; and how many new reasons,
# and how many new numbers, it writes at most.
_FIRST = 256
_STRETCH = 512
_MAX_CHANGED = 256
_MAX_READ = 2 * _FIRST + _STRETCH
_ROWS_A_WRITE = 16
_STARTS_AT_ONCE = 64
TELL_ON_S = 0.2
LOOK_ON_S = 2.0
# Deciding takes at most a tenth of the time, and so does explaining.
_REST = 9.0
# While nothing is free, new jobs need few passes.
_FULL_REST_S = 0.1
_P = ParamSpec("_P")
_T = TypeVar("_T")
# Why a job waits, and whether the reason is new.
_Reason = tuple[QueuedJob, job_pb2.PendingInfo, bool]


@dataclass(frozen=True)
class _Explained:
    """The reasons to write. `ends`: when the first back-off ends, in seconds. `place`: where the next one begins;
    `more_s`: how soon it should, None if the whole line has been seen.
    """

    reasons: tuple[_Reason, ...]
    ends: float | None
    place: int
    more_s: float | None


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
        self._place = _FIRST
        self._deciding_s = 0.0
        self._tell_after_s = 0.0
        self._full = False
        self._freed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe = store.subscribe(self._hear)

    def start(self) -> None:
        """Starts the loop; only after recovery, so that all held slots are known."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops the loop; recorded decisions stay."""
        self._unsubscribe()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def cluster_slots(self, view: ClusterView) -> tuple[int, int]:
        """All slots of the cluster, and those that no gang holds."""
        live = await self._store.read(attempts.held_slots)
        snapshot = load_snapshot((), live, view, self._clock.now_us())
        return sum(slots_of(node) for node in view.nodes), sum(free_slots(snapshot).values())

    async def step(self) -> float | None:
        """Makes a whole pass; returns the seconds until the next one is due by itself, None if none is."""
        self._seen = view = await self._launcher.cluster()
        ends = await self._start_gangs(view)
        return min((due for due in (self._until(ends), await self._say_why(view)) if due is not None), default=None)

    async def _start_gangs(self, view: ClusterView) -> float | None:
        """Starts all jobs that fit now; returns the end of the first back-off of the examined jobs, in seconds."""
        self._freed.clear()
        self._deciding_s = 0.0
        now_us = self._clock.now_us()
        live = await self._store.read_many(self._counted(attempts.held_slots))
        free = await asyncio.to_thread(self._counted(load_snapshot), (), live, view, now_us)
        admission = Admission(free, now_us // 1_000_000, self._policy)
        self._full = admission.is_over
        if self._full:
            return None  # Waiting jobs need not be read.
        # Read after the held slots: a gang that ends in between counts as running, so no job starts too early.
        line = await self._store.read_many(self._counted(partial(queue.head_of_line, most=_HEAD)))
        decide = self._counted(_decide)
        starts, ends = await asyncio.to_thread(decide, admission, line, view, now_us)
        if len(line) == _HEAD and not admission.is_over:
            rest = await self._store.read_many(self._counted(partial(queue.rest_of_line, first=_HEAD)))
            more, ends_more = await asyncio.to_thread(decide, admission, rest, view, now_us)
            starts, ends = starts + more, min((each for each in (ends, ends_more) if each), default=None)
        self._trace.point("decide.done")
        for first in range(0, len(starts), _STARTS_AT_ONCE):
            await asyncio.gather(*(self._apply(start, view) for start in starts[first : first + _STARTS_AT_ONCE]))
        return ends

    def _counted(self, work: Callable[_P, _T]) -> Callable[_P, _T]:
        """The same work with its CPU time counted, so that a busy machine does not lengthen the rest."""

        def run(*args: _P.args, **keywords: _P.kwargs) -> _T:
            begun_s = time.thread_time()
            try:
                return work(*args, **keywords)
            finally:
                self._deciding_s += time.thread_time() - begun_s

        return run

    async def _apply(self, start: Start, view: ClusterView) -> None:
        def record(conn: Connection) -> AttemptKey:
            job, now_us = jobs.get_job_by_row(conn, int(start.job)), self._clock.now_us()
            if job is None or job.state is not JobState.QUEUED or job.deleted_us:
                raise StaleWrite(f"the job of row {start.job} waits no longer")
            _, attempt = attempts.start_attempt(
                conn,
                job,
                start.placement,
                cluster_id=view.cluster_id,
                export_uid=uuid.uuid4().hex,
                now_us=now_us,
            )
            return AttemptKey(job.uid, attempt.epoch)

        try:
            key = await self._store.write(record, SYSTEM)
        except StaleWrite as stale:
            _log.info("a start was not recorded: %s", stale)
            return
        self._trace.point("attempt.recorded")
        self._collector.follow(key)

    async def _say_why(self, view: ClusterView) -> float | None:
        """Explains why jobs wait; returns the seconds until there is more to explain."""
        now_us = self._clock.now_us()
        live, queued = await self._store.read_many(partial(_waiting, place=self._place))
        look = partial(_look, now_us=now_us, policy=self._policy, place=self._place)
        made = await asyncio.to_thread(look, queued, live, view)
        if made is None:
            return None
        if not await self._tell(made):
            return 0.0
        self._place = made.place
        return min((due for due in (made.more_s, self._until(made.ends)) if due is not None), default=None)

    def _until(self, ends: float | None) -> float | None:
        return None if ends is None else max(ends - self._clock.now_us() / 1e6, 0.0)

    async def _tell(self, made: _Explained) -> bool:
        """Records why jobs wait: with an event if the reason is new, without one if only its numbers are.

        False if it was interrupted, because a gang has ended.
        """
        rows: list[tuple[QueuedJob, bytes, EventDraft | None]] = []
        for job, info, is_new in made.reasons:
            event = encode.draft(EventKind.PENDING, job_pb2.JobEvent(pending=info)) if is_new else None
            rows.append((job, info.SerializeToString(), event))
        # A few at a time, so that submissions wait for one such write at most.
        for first in range(0, len(rows), _ROWS_A_WRITE):
            if self._freed.is_set():
                return False  # Slots are free again: the remaining jobs get their reasons in the next pass.
            some = rows[first : first + _ROWS_A_WRITE]
            await self._store.write(partial(queue.set_pending, rows=some, now_us=self._clock.now_us()), SYSTEM)
        return True

    async def _run(self) -> None:
        while True:
            self._deciding_s = 0.0
            try:
                pause_s = await self._turn()
            except Refused as refused:
                pause_s = refused.retry_after_s or _RETRY_S
            except Exception:  # The edge of a supervised loop: a defect must not end the queue.
                _log.exception("a scheduling pass failed; it is made again")
                pause_s = _RETRY_S
            await asyncio.sleep(self._deciding_s * _REST)
            if self._full:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_FULL_REST_S):
                        await self._freed.wait()
            await self._wait(pause_s)

    async def _turn(self) -> float | None:
        """A pass, without its second half while that rests, so that free slots never wait for it."""
        self._seen = view = await self._launcher.cluster()
        dues = [self._until(await self._start_gangs(view))]
        begun_s = time.monotonic()
        if begun_s >= self._tell_after_s:
            dues.append(await self._say_why(view))
            ended_s = time.monotonic()
            self._tell_after_s = ended_s + (ended_s - begun_s) * _REST
        else:
            dues.append(self._tell_after_s - begun_s)
        return min((due for due in dues if due is not None), default=None)

    async def _wait(self, pause_s: float | None) -> None:
        """Waits until the store reports a change, or the cluster is due to be looked at."""
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
        if any(record.kind in (EventKind.STATE, EventKind.UPDATED) for record in records):
            self._hint.set()
        if any(record.kind is EventKind.ATTEMPT and encode.attempt_has_ended(record) for record in records):
            self._freed.set()


def _waiting(conn: Connection, place: int) -> tuple[list[HeldSlots], list[QueuedJob]]:
    return attempts.held_slots(conn), queue.some_queued(conn, _FIRST, place, place + _STRETCH, _MAX_READ)


def _decide(
    admission: Admission, line: Sequence[LineJob], view: ClusterView, now_us: int
) -> tuple[list[Start], float | None]:
    """The starts among these jobs, and the end of the first back-off; examines jobs while slots are left."""
    starts: list[Start] = []
    ends: float | None = None
    for first in range(0, len(line), _HEAD):
        if admission.is_over:
            break
        for job in pending_jobs(line[first : first + _HEAD], view, now_us):
            found = admission.consider(job)
            if isinstance(found, Start):
                starts.append(found)
            elif found.until:
                ends = min(ends or found.until, found.until)
    return starts, ends


def _look(
    queued: Sequence[QueuedJob],
    live: Sequence[HeldSlots],
    view: ClusterView,
    *,
    now_us: int,
    policy: Policy,
    place: int,
) -> _Explained | None:
    """Why these jobs wait; None if none waits."""
    if not queued:
        return None
    now = now_us // 1_000_000
    cut = len(queued) == _MAX_READ
    _, waiting = admit(load_snapshot(queued, live, view, now_us), now, policy)
    due = {str(job.id): job for job in queued if _is_due(job, place)}
    changed, quiet = _reasons([each for each in waiting if each[0].job in due], due, now)
    left = [job.position for job, _, _ in changed[_MAX_CHANGED:]] + [queued[-1].position + 1] * cut
    # If reasons have changed, those of the next jobs most likely have, too.
    hurry = bool(left) or any(job.pending for job, _, _ in changed)
    return _Explained(
        reasons=(*changed[:_MAX_CHANGED], *quiet[:_MAX_CHANGED]),
        ends=min((blocked.until for _, blocked in waiting if blocked.until), default=None),
        place=_next_place(place, min(left, default=None), ends=queued[-1].position < place + _STRETCH),
        more_s=None if len(queued) <= _FIRST else TELL_ON_S if hurry else LOOK_ON_S,
    )


def _is_due(job: QueuedJob, place: int) -> bool:
    """Whether a pass over the stretch after `place` explains this job."""
    in_turn = job.position <= _FIRST or place < job.position <= place + _STRETCH
    return in_turn or job.pending is None or job.not_before_us > 0


def _next_place(place: int, left: int | None, *, ends: bool) -> int:
    """Where the next stretch begins: here again if jobs of it are left, at the front after the line's end."""
    if left is not None and left <= place + _STRETCH:
        return place
    return _FIRST if ends else place + _STRETCH


def _reasons(
    waiting: Sequence[tuple[PendingJob, Blocked]], queued: Mapping[str, QueuedJob], now: int
) -> tuple[list[_Reason], list[_Reason]]:
    """The reasons that need an event, and those with new numbers only, in the order of the queue."""
    changed, quiet = [], []
    for key, wait in waits(waiting, {key: job.position for key, job in queued.items()}, now).items():
        job, info = queued[key], _pending_info(wait)
        held = job_pb2.PendingInfo.FromString(job.pending or b"")
        if info.constraint != held.constraint:
            changed.append((job, info, True))
        elif info != held:
            quiet.append((job, info, False))
    return changed, quiet


def _pending_info(wait: Waiting) -> job_pb2.PendingInfo:
    return job_pb2.PendingInfo(
        constraint=job_pb2.PendingInfo.Constraint.Value(f"CONSTRAINT_{wait.constraint.value}"),
        message=wait.message,
        needed_slots=wait.needed_slots,
        free_slots=wait.free_slots,
        position=wait.position,
        until=Timestamp(seconds=wait.until) if wait.until else None,
    )
