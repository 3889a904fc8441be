"""Explains why jobs wait, in words and numbers, from the same pass of the policy that starts jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardyard_coordinator.scheduling.policy import Blocked, Constraint, PendingJob, Policy, Snapshot, admit, ranked


@dataclass(frozen=True)
class Waiting:
    """Why a job does not run yet, in words and numbers; `until` is in seconds, 0 if it is not known."""

    constraint: Constraint
    message: str
    needed_slots: int
    free_slots: int
    position: int
    until: int


def explain(snapshot: Snapshot, now: int, policy: Policy) -> dict[str, Waiting]:
    """The reason of every pending job that would not start now, by its id."""
    _, waiting = admit(snapshot, now, policy)
    positions = {job.job: position for position, job in enumerate(ranked(snapshot.pending), 1)}
    return waits(waiting, positions, now)


def waits(waiting: Sequence[tuple[PendingJob, Blocked]], positions: Mapping[str, int], now: int) -> dict[str, Waiting]:
    """The same for a finished pass; `positions` are the positions in line."""
    return {job.job: _waiting(blocked, positions[job.job], now) for job, blocked in waiting}


def _waiting(blocked: Blocked, position: int, now: int) -> Waiting:
    need, have, ahead = blocked.need, blocked.have, position - 1
    needs = f"needs {need} slot{'s' * (need != 1)}"
    others = f"; {blocked.others} are held by others than this service" if blocked.others else ""
    message = {
        Constraint.CLUSTER_UNREACHABLE: "the cluster is not connected; it is tried again",
        Constraint.NOT_BEFORE: f"waits {blocked.until - now} s before it is tried again",
        Constraint.NO_SUCH_NODE: f"{needs} as its workers want them, which the cluster does not have",
        Constraint.RANK: f"{needs}; {ahead} job{'s are' if ahead != 1 else ' is'} ahead of it",
        Constraint.INSUFFICIENT_SLOTS: f"{needs}, {have} free{others}",
        Constraint.FRAGMENTED: f"{needs}, {have} free, but not as its workers want them{others}",
    }[blocked.constraint]
    return Waiting(blocked.constraint, message, need, have, position, blocked.until)
