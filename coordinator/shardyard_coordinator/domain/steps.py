"""Errors of guarded writes: the row has changed since it was read."""

from __future__ import annotations

from shardyard_coordinator.domain.states import JobState


class IllegalMove(Exception):
    """The table of states does not allow the step: a defect of the caller."""

    def __init__(self, job_uid: str, current: JobState, target: JobState) -> None:
        super().__init__(f"job {job_uid} cannot go from {current} to {target}")
        self.job_uid = job_uid
        self.current = current
        self.target = target


class StaleWrite(Exception):
    """Another writer was faster: the row has another state, or the attempt another epoch, than the writer had read."""
