"""What goes wrong inside the coordinator when a guarded write meets a world that has moved on."""

from __future__ import annotations

from shardyard_coordinator.domain.states import JobState


class IllegalMove(Exception):
    """A step that the table of states does not have: a defect of the caller."""

    def __init__(self, job_uid: str, current: JobState, target: JobState) -> None:
        super().__init__(f"job {job_uid} cannot go from {current} to {target}")
        self.job_uid = job_uid
        self.current = current
        self.target = target


class StaleWrite(Exception):
    """Somebody was faster: the row is not in the state, or the attempt not of the epoch, that the writer had read."""
