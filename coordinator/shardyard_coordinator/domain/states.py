"""The states of jobs and attempts, and the one table of legal steps between them (docs/states.md)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class JobState(StrEnum):
    """The states of a job."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    RUNNING = "RUNNING"
    FINALIZING = "FINALIZING"
    RECOVERING = "RECOVERING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can follow: derived from the table."""
        return not TRANSITIONS[self]


_S = JobState

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        _S.QUEUED: frozenset({_S.PREPARING, _S.PAUSED, _S.CANCELLED, _S.FAILED}),
        _S.PREPARING: frozenset({_S.RUNNING, _S.RECOVERING, _S.PAUSING, _S.PAUSED, _S.CANCELLING, _S.FAILED}),
        _S.RUNNING: frozenset({_S.FINALIZING, _S.RECOVERING, _S.PAUSING, _S.PAUSED, _S.CANCELLING, _S.FAILED}),
        _S.FINALIZING: frozenset({_S.SUCCEEDED, _S.RECOVERING, _S.PAUSED, _S.CANCELLING, _S.FAILED}),
        _S.RECOVERING: frozenset({_S.QUEUED, _S.PAUSING, _S.PAUSED, _S.CANCELLING, _S.FAILED}),
        _S.PAUSING: frozenset({_S.PAUSED, _S.FINALIZING, _S.CANCELLING, _S.FAILED}),
        _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
        _S.CANCELLING: frozenset({_S.CANCELLED}),
        _S.SUCCEEDED: frozenset(),
        _S.FAILED: frozenset(),
        _S.CANCELLED: frozenset(),
    }
)


class AttemptState(StrEnum):
    """The states of one launch of a gang."""

    STARTING = "STARTING"
    ACTIVE = "ACTIVE"
    STOPPING = "STOPPING"
    ENDED = "ENDED"


def may_move(current: JobState, target: JobState) -> bool:
    """Whether the table allows the step."""
    return target in TRANSITIONS[current]
