"""Which directives a gang gets, and when it is ended by force: decided from its job, its attempt and a clock.

Deadlines run on the monotonic clock; the wall clock only gives the time that ran under an earlier coordinator process.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.ending import PAUSE
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.records import AttemptRecord, JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.seams import Clock

Action: TypeAlias = "worker_pb2.Directive.Action.ValueType"
_NOTHING = worker_pb2.Directive.ACTION_UNSPECIFIED
_STOP = worker_pb2.Directive.ACTION_STOP
_PAUSE = worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP


class Order(NamedTuple):
    """A directive that is due: what to do, and why."""

    action: Action
    reason: str


class Orders:
    """One attempt's orders and deadlines. `paused_s`: how long its job was paused since its first step."""

    def __init__(self, clock: Clock, settings: ControlSettings) -> None:
        self.paused_s = 0.0
        self._clock = clock
        self._settings = settings
        self._given: Action = _NOTHING
        self._spec = b""
        self._limit_s = 0.0
        self._stop_by_s: float | None = None
        self._end_by_s: float | None = None
        self._start_by_s = clock.monotonic_s() + settings.start_timeout_s
        self._run_by_s: float | None = None
        self._heard = 0

    @property
    def next_s(self) -> float | None:
        """The time of the next deadline; None if there is none."""
        deadlines = [self._stop_by_s, self._end_by_s, self._run_by_s, self._start_by_s]
        return min((each for each in deadlines if each), default=None)

    def watch(self, job: JobRecord, attempt: AttemptRecord) -> None:
        """Updates the deadlines for the current state of job and attempt."""
        now_s = self._clock.monotonic_s()
        if job.state is not JobState.PREPARING:
            self._start_by_s = 0.0
        elif self._start_by_s and attempt.high_water > self._heard:
            # A gang that says how far it is has not stuck.
            self._start_by_s = now_s + self._settings.start_timeout_s
        self._heard = attempt.high_water
        if attempt.failure and self._end_by_s is None:
            self._end_by_s = now_s + self._settings.failure_grace_s
        if self._given != _NOTHING:
            return
        if job.resolved_spec != self._spec:
            self._spec, self._run_by_s = job.resolved_spec, None
            self._limit_s = spec_pb2.JobSpec.FromString(job.resolved_spec).max_run_time.ToNanoseconds() / 1e9
        limit_s = self._limit_s
        if limit_s and job.start_us and self._run_by_s is None:
            ran_s = (self._clock.now_us() - job.start_us) / 1e6 - self.paused_s
            self._run_by_s = now_s + min(max(limit_s - ran_s, 0.0), limit_s)

    def reached(self, *, reached: bool) -> None:
        """Suspends the start deadline while the gang cannot be reached: it may have started."""
        if self._start_by_s:
            self._start_by_s = self._clock.monotonic_s() + self._settings.start_timeout_s if reached else math.inf

    def must_end(self, job: JobRecord, attempt: AttemptRecord) -> bool:
        """Whether to end the gang by force: it was lost, or its grace period is over."""
        if self._given == _PAUSE and job.state is JobState.FINALIZING:
            # Its training was over before the directive arrived: it may finish.
            self._given, self._stop_by_s = _NOTHING, None
        is_lost = attempt.state is AttemptState.STOPPING and not attempt.stop_reason
        return is_lost or self._is_over(self._end_by_s) or self._is_over(self._stop_by_s)

    def due(self, job: JobRecord, attempt: AttemptRecord) -> Order | None:
        """The order to give now; None if there is none, or it was given already."""
        order = self._wish(job, attempt)
        return None if order is None or self._given in (order.action, _STOP) else order

    def give(self, order: Order, attempt: AttemptRecord) -> None:
        """Notes that the order is being sent: its grace period begins."""
        self._given = order.action
        self._stop_by_s = self._clock.monotonic_s() + self._grace_s(order.action, attempt)
        self._start_by_s, self._run_by_s = 0.0, None

    def _wish(self, job: JobRecord, attempt: AttemptRecord) -> Order | None:
        if job.state is JobState.CANCELLING:
            return Order(_STOP, JobState.CANCELLED.value)
        if job.state is JobState.PAUSING:
            return Order(_PAUSE, PAUSE)
        if attempt.stop_reason not in ("", PAUSE):
            return Order(_STOP, attempt.stop_reason)
        if self._is_over(self._run_by_s):
            return Order(_STOP, Cause.MAX_RUN_TIME.value)
        if self._start_by_s and job.state is JobState.PREPARING and self._is_over(self._start_by_s):
            return Order(_STOP, Cause.ENGINE_START_TIMEOUT.value)
        return None

    def _grace_s(self, action: Action, attempt: AttemptRecord) -> float:
        """The time that the gang has to follow a directive before it is ended by force."""
        settings = self._settings
        if not (attempt.last_step or attempt.committed):
            return min(settings.unbegun_grace_s, settings.stop_grace_s)
        return settings.pause_grace_s if action == _PAUSE else settings.stop_grace_s

    def _is_over(self, deadline_s: float | None) -> bool:
        return deadline_s is not None and self._clock.monotonic_s() >= deadline_s
