"""Contact with a gang: questions are repeated until answered; until then the job has the condition UNREACHABLE."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection

from shardyard.v1 import job_pb2
from shardyard_coordinator.control.recording import with_condition
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.domain.records import AttemptRecord, EventKind, JobRecord
from shardyard_coordinator.domain.states import AttemptState
from shardyard_coordinator.launch.protocols import ClusterView, Launcher, Unreachable
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.store import encode, events, jobs

_T = TypeVar("_T")
_TYPE = job_pb2.Condition.TYPE_UNREACHABLE


class Silence(NamedTuple):
    """Why a gang does not answer, and the time of its last answer."""

    why: str
    heard_us: int


class Tell(Protocol):
    """Records that contact was lost (`message` says why) or restored."""

    async def __call__(self, *, lost: bool, message: str) -> None:
        """Returns when it is recorded."""


class Contact:
    """Questions of one follower to its launcher. `lost`: the job has the condition, which the next answer ends.

    `heard_us`: when the last question was answered.
    """

    def __init__(self, launcher: Launcher, settings: ControlSettings, clock: Clock, tell: Tell) -> None:
        self.lost = False
        self.heard_us = clock.now_us()
        self._why = ""
        self._clock = clock
        self._launcher = launcher
        self._settings = settings
        self._tell = tell

    def take_up(self, job: JobRecord) -> None:
        """Adopts the condition that the job has already."""
        held = _held(job)
        self.lost = held is not None
        self.heard_us = held.time.ToMicroseconds() if held else self.heard_us

    async def view(self) -> ClusterView:
        """The cluster, once it is connected."""
        return await self.reach(self.look)

    async def look(self) -> ClusterView:
        """The cluster. Raises: Unreachable if it is not connected."""
        seen = await self._launcher.cluster()
        if not seen.connected:
            raise Unreachable(seen.message)
        return seen

    async def reach(self, ask: Callable[[], Coroutine[None, None, _T]], *, tell: bool = True) -> _T:
        """Asks until there is an answer; without `tell`, silence is not recorded."""
        wait_s = self._settings.retry_min_s
        while True:
            try:
                answer = await ask()
            except Unreachable as error:
                if tell and not (self.lost and self._why == str(error)):
                    self.lost, self._why = True, str(error)
                    await self._tell(lost=True, message=str(error))
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, self._settings.retry_max_s)
                continue
            if self.lost:
                self.lost = False
                await self._tell(lost=False, message="")
            self.heard_us = self._clock.now_us()
            return answer


def record_silence(conn: Connection, job: JobRecord, attempt: AttemptRecord, silence: Silence, now_us: int) -> None:
    """Begins the condition, with an event; a later reason replaces its message in the job, without another event."""
    if _is_over(job, attempt):
        return
    before = _held(job)
    time = encode.timestamp(now_us) if before is None else before.time
    message = _words(job, attempt, silence)
    condition = job_pb2.Condition(type=_TYPE, active=True, message=message, time=time)
    _record(conn, job, condition, now_us, tell=before is None)


def record_answer(conn: Connection, job: JobRecord, attempt: AttemptRecord, now_us: int) -> None:
    """Ends the condition, with an event; nothing if the attempt is over or the condition does not hold."""
    if not _is_over(job, attempt) and _held(job) is not None:
        over = job_pb2.Condition(type=_TYPE, active=False, time=encode.timestamp(now_us))
        _record(conn, job, over, now_us, tell=True)


def _held(job: JobRecord) -> job_pb2.Condition | None:
    return next((each for each in job_pb2.Job.FromString(job.conditions).conditions if each.type == _TYPE), None)


def _is_over(job: JobRecord, attempt: AttemptRecord) -> bool:
    return attempt.state is AttemptState.ENDED or job.state.is_terminal or job.epoch != attempt.epoch


def _record(conn: Connection, job: JobRecord, condition: job_pb2.Condition, now_us: int, *, tell: bool) -> None:
    jobs.change_job(conn, job.uid, now_us, {"conditions": with_condition(job.conditions, condition)})
    if tell:
        draft = encode.draft(EventKind.CONDITION, job_pb2.JobEvent(condition=condition), job.epoch)
        events.append(conn, job.uid, [draft], now_us)


def _words(job: JobRecord, attempt: AttemptRecord, silence: Silence) -> str:
    """The gang's nodes, the time of the last contact, the reason, and what a person can do."""
    nodes = ", ".join(node[:12] for node, _ in attempt.placement)
    where = f" on {nodes}" if nodes else ""
    since = encode.timestamp(silence.heard_us).ToDatetime()
    return (
        f"attempt {attempt.epoch}{where} has not answered since {since:%Y-%m-%d %H:%M:%S} UTC: {silence.why}. "
        "It may still be running, and the service keeps asking; if it is permanently gone, end the job "
        f"(`shardyard cancel --lost {job.job_id}`)"
    )
