"""Counts what happens to jobs and attempts, from the events of every commit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.log_context import logged_about
from shardyard_coordinator.monitoring import families
from shardyard_coordinator.monitoring.registry import Metrics
from shardyard_coordinator.store import encode

_log = logging.getLogger(__name__)
MOST_FOLLOWED = 200_000
"""Jobs whose time of entering a state is kept, about 300 bytes each; of more jobs the states are not timed."""

_CAUSES = frozenset(cause.value for cause in Cause)


class Lives:
    """A subscriber of the store: call `hear` with the events of each commit. Without `metrics` it only logs."""

    def __init__(self, metrics: Metrics | None) -> None:
        self._metrics = metrics
        self._since: dict[str, tuple[str, int]] = {}

    def hear(self, records: Sequence[EventRecord]) -> None:
        """Takes the events of a commit, in order; quick, because the event loop waits."""
        for record in records:
            if self._metrics:
                self._metrics.add(families.EVENTS, 1, record.kind.name)
            if record.kind is EventKind.STATE:
                self._moved(record)
            elif record.kind is EventKind.ATTEMPT:
                self._attempt(record)

    def _moved(self, record: EventRecord) -> None:
        change = encode.event_to_proto(record).state
        state = job_pb2.State.Name(change.to).removeprefix("STATE_")
        if state not in JobState.__members__:
            return
        is_over = JobState(state).is_terminal
        if self._metrics:
            self._time(self._metrics, record, state, is_over=is_over)
            if getattr(change, "from") == job_pb2.STATE_UNSPECIFIED:
                self._metrics.add(families.JOBS_CREATED, 1)
            if is_over:
                self._metrics.add(families.JOBS_ENDED, 1, state)
        if _log.isEnabledFor(logging.INFO):
            cause = {"cause": _cause(change.failure.reason)} if change.HasField("failure") else {}
            with logged_about(job_uid=record.job_uid, attempt=record.attempt, state=state, **cause):
                _log.info("the job's state has changed")

    def _time(self, metrics: Metrics, record: EventRecord, state: str, *, is_over: bool) -> None:
        before = self._since.pop(record.job_uid, None)
        if before is not None:
            metrics.observe(families.STATE_SECONDS, max(record.time_us - before[1], 0) / 1e6, before[0])
        if not is_over and len(self._since) < MOST_FOLLOWED:
            self._since[record.job_uid] = state, record.time_us

    def _attempt(self, record: EventRecord) -> None:
        attempt = encode.event_to_proto(record).attempt_changed.attempt
        if attempt.state != job_pb2.Attempt.STATE_ENDED:
            return
        cause = _cause(attempt.failure.reason) if attempt.HasField("failure") else "none"
        if self._metrics:
            self._metrics.add(families.ATTEMPTS_ENDED, 1, cause)
        if _log.isEnabledFor(logging.INFO):
            with logged_about(job_uid=record.job_uid, attempt=record.attempt, cause=cause):
                _log.info("an attempt has ended")


def _cause(reason: str) -> str:
    """The cause as a label: a gang reports it as a text, which could be any."""
    return reason if reason in _CAUSES else Cause.UNKNOWN.value
