"""The way to a gang: questions are repeated until answered; meanwhile the job has the condition UNREACHABLE."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Protocol, TypeVar

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


class Tell(Protocol):
    """Records that contact was lost, or is there again."""

    async def __call__(self, *, lost: bool, message: str) -> None:
        """Returns when it is recorded."""


class Contact:
    """Questions of one follower to its launcher. `lost`: the job has the condition, which the next answer ends."""

    def __init__(self, launcher: Launcher, settings: ControlSettings, tell: Tell) -> None:
        self.lost = False
        self._launcher = launcher
        self._settings = settings
        self._tell = tell

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
                if tell and not self.lost:
                    self.lost = True
                    await self._tell(lost=True, message=str(error))
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, self._settings.retry_max_s)
                continue
            if self.lost:
                self.lost = False
                await self._tell(lost=False, message="")
            return answer


def is_unreachable(job: JobRecord) -> bool:
    """Whether the job has the condition."""
    held = job_pb2.Job.FromString(job.conditions).conditions
    return any(each.type == job_pb2.Condition.TYPE_UNREACHABLE for each in held)


def record_contact(
    conn: Connection, job: JobRecord, attempt: AttemptRecord, *, lost: bool, message: str, clock: Clock
) -> None:
    """Begins or ends the condition, with an event; nothing if the attempt is over or it was recorded before."""
    if attempt.state is AttemptState.ENDED or job.state.is_terminal or job.epoch != attempt.epoch:
        return
    if lost == is_unreachable(job):
        return  # It begins once, and ends once.
    now_us = clock.now_us()
    condition = job_pb2.Condition(
        type=job_pb2.Condition.TYPE_UNREACHABLE, active=lost, message=message, time=encode.timestamp(now_us)
    )
    jobs.change_job(conn, job.uid, now_us, {"conditions": with_condition(job.conditions, condition)})
    draft = encode.draft(EventKind.CONDITION, job_pb2.JobEvent(condition=condition), attempt.epoch)
    events.append(conn, job.uid, [draft], now_us)
