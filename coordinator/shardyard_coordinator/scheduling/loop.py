"""Load → decide → apply: the loop that carries out what the policy decides.

A pass is made when something has changed (a job's state, the cluster) or a back-off ends; each start is a transaction
of its own, guarded by what was read, so a stale decision changes nothing. Why the others wait is told when the reason
changes, not when its numbers do.

A long queue must not cost those who submit to it. So a pass decides in a thread of the readers, the loop rests after it
in proportion to the time that it took, and a pass tells so many reasons and no more: to the first in line, to who has
none yet, and to a stretch of the others, which moves on with every pass. Where nothing is free it reads nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
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
from shardyard_coordinator.scheduling.policy import Blocked, PendingJob, Policy, Start, admit, free_slots
from shardyard_coordinator.scheduling.snapshot import load_snapshot, slots_of
from shardyard_coordinator.seams import SYSTEM, Clock, Trace
from shardyard_coordinator.store import attempts, encode, jobs, queue
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
_WATCH_CLUSTER_S = 2.0
_RETRY_S = 1.0
# The first in line, whose numbers every pass brings up to date; how many others a pass looks at; and at most how many
# reasons, and as many numbers, it writes.
_FIRST = 256
_STRETCH = 512
_MAX_TOLD = 256
_MAX_READ = 2 * _FIRST + _STRETCH
_ROWS_A_WRITE = 16
TELL_ON_S = 0.2
LOOK_ON_S = 2.0
# A pass takes at most a tenth of the time.
_REST = 9.0
_MAX_REST_S = 1.0
# Why a job waits, and whether that is another reason than before.
_Reason = tuple[QueuedJob, job_pb2.PendingInfo, bool]


@dataclass(frozen=True)
class _Pass:
    """What one pass has decided.

    `ends`: when the first back-off does, in seconds. `place`: after which the next pass looks on; `more_s`: how soon it
    should, None where the whole line has been seen.
    """

    starts: tuple[tuple[QueuedJob, Start], ...]
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
        self._seen = view = await self._launcher.cluster()
        look = partial(_look, view=view, now_us=self._clock.now_us(), policy=self._policy, place=self._place)
        made = await self._store.read(look)
        if made is None:
            return None
        self._trace.point("decide.done")
        for job, start in made.starts:
            await self._apply(job, start, view)
        await self._tell(made)
        self._place = made.place
        due = [made.more_s] if made.more_s is not None else []
        if made.ends is not None:
            due.append(max(made.ends - self._clock.now_us() / 1e6, 0.0))
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
        rows: list[tuple[QueuedJob, bytes, EventDraft | None]] = []
        for job, info, is_new in made.reasons:
            event = encode.draft(EventKind.PENDING, job_pb2.JobEvent(pending=info)) if is_new else None
            rows.append((job, info.SerializeToString(), event))
        # A few at a time: callers who submit meanwhile wait for one such write at most.
        for first in range(0, len(rows), _ROWS_A_WRITE):
            some = rows[first : first + _ROWS_A_WRITE]
            await self._store.write(partial(queue.set_pending, rows=some, now_us=self._clock.now_us()), SYSTEM)

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


def _look(conn: Connection, view: ClusterView, now_us: int, policy: Policy, place: int) -> _Pass | None:
    """Loads and decides; None where nobody waits."""
    live = attempts.live_attempts(conn)
    if any(free_slots(load_snapshot((), live, view, now_us)).values()):
        queued, cut = queue.all_queued(conn), False
    else:
        queued = queue.some_queued(conn, _FIRST, place, place + _STRETCH, _MAX_READ)
        cut = len(queued) == _MAX_READ
    if not queued:
        return None
    now = now_us // 1_000_000
    starts, waiting = admit(load_snapshot(queued, live, view, now_us), now, policy)
    by_uid = {job.uid: job for job in queued}
    due = {job.uid: job for job in queued if _is_due(job, place)}
    told, quiet = _reasons([each for each in waiting if each[0].job in due], due, now)
    left = [job.position for job, _, _ in told[_MAX_TOLD:]] + [queued[-1].position + 1] * cut
    # Where reasons have changed, those of who comes next most likely have, too.
    hurry = bool(left) or any(job.pending for job, _, _ in told)
    return _Pass(
        starts=tuple((by_uid[start.job], start) for start in starts),
        reasons=(*told[:_MAX_TOLD], *quiet[:_MAX_TOLD]),
        ends=min((blocked.until for _, blocked in waiting if blocked.until), default=None),
        place=_next_place(place, min(left, default=None), ends=queued[-1].position < place + _STRETCH),
        more_s=None if len(queued) <= _FIRST else TELL_ON_S if hurry else LOOK_ON_S,
    )


def _is_due(job: QueuedJob, place: int) -> bool:
    """Whether a pass over the stretch after `place` says why the job waits."""
    in_turn = job.position <= _FIRST or place < job.position <= place + _STRETCH
    return in_turn or job.pending is None or job.not_before_us > 0


def _next_place(place: int, left: int | None, *, ends: bool) -> int:
    """Where the next stretch begins: here again if somebody of it is left, at the first one after the line's end."""
    if left is not None and left <= place + _STRETCH:
        return place
    return _FIRST if ends else place + _STRETCH


def _reasons(
    waiting: Sequence[tuple[PendingJob, Blocked]], jobs_: Mapping[str, QueuedJob], now: int
) -> tuple[list[_Reason], list[_Reason]]:
    """Those to be told with an event, and those of whom only numbers have changed; in the order of the line."""
    told, quiet = [], []
    for uid, wait in waits(waiting, {uid: job.position for uid, job in jobs_.items()}, now).items():
        job, info = jobs_[uid], _pending_info(wait)
        held = job_pb2.PendingInfo.FromString(job.pending or b"")
        if info.constraint != held.constraint:
            told.append((job, info, True))
        elif info != held:
            quiet.append((job, info, False))
    return told, quiet


def _pending_info(wait: Waiting) -> job_pb2.PendingInfo:
    return job_pb2.PendingInfo(
        constraint=job_pb2.PendingInfo.Constraint.Value(f"CONSTRAINT_{wait.constraint.value}"),
        message=wait.message,
        needed_slots=wait.needed_slots,
        free_slots=wait.free_slots,
        position=wait.position,
        until=Timestamp(seconds=wait.until) if wait.until else None,
    )
