"""The policy without its memos: every job looks at every node. The reference that the real one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from shardyard_coordinator.scheduling.policy import (
    Backfill,
    Blocked,
    Constraint,
    NodeInfo,
    PendingJob,
    Placement,
    Policy,
    Snapshot,
    Start,
    admits,
    free_slots,
    ranked,
)


def plain_admit(snapshot: Snapshot, now: int, policy: Policy) -> tuple[list[Start], list[tuple[PendingJob, Blocked]]]:
    """What `admit` answers, by sums over all nodes for each job."""
    nodes = tuple(sorted(snapshot.nodes, key=lambda node: node.id))
    free = free_slots(snapshot)
    whole = {node.id: node.slots for node in nodes}
    starts: list[Start] = []
    waiting: list[tuple[PendingJob, Blocked]] = []
    stuck = False
    for job in ranked(snapshot.pending):
        found = _consider(job, now, nodes, free, whole=whole, connected=snapshot.connected, stuck=stuck)
        if isinstance(found, Start):
            starts.append(found)
            for node, workers in found.placement:
                free[node] -= workers * job.slots_per_worker
            continue
        waiting.append((job, found))
        for_room = found.constraint in (Constraint.INSUFFICIENT_SLOTS, Constraint.FRAGMENTED)
        stuck = stuck or (policy.backfill is Backfill.NONE and for_room)
    return starts, waiting


def _consider(
    job: PendingJob,
    now: int,
    nodes: Sequence[NodeInfo],
    free: dict[str, int],
    *,
    whole: dict[str, int],
    connected: bool,
    stuck: bool,
) -> Start | Blocked:
    need = min(job.sizes) * job.slots_per_worker
    have = sum(free[node.id] for node in nodes if admits(node, job))
    if not connected:
        return Blocked(Constraint.CLUSTER_UNREACHABLE, need, have)
    if job.not_before > now:
        return Blocked(Constraint.NOT_BEFORE, need, have, until=job.not_before)
    if not plain_place(job, min(job.sizes), nodes, whole):
        return Blocked(Constraint.NO_SUCH_NODE, need, have)
    if stuck:
        return Blocked(Constraint.RANK, need, have)
    for size in job.sizes:
        placement = plain_place(job, size, nodes, free)
        if placement:
            return Start(job.job, job.epoch + 1, size, placement)
    return Blocked(Constraint.FRAGMENTED if have >= need else Constraint.INSUFFICIENT_SLOTS, need, have)


def plain_place(job: PendingJob, workers: int, nodes: Sequence[NodeInfo], free: dict[str, int]) -> Placement:
    """Where `workers` of the job fit now: on one node if one is free enough (the fullest such), else on the emptiest
    nodes, the last one chosen as tightly as possible; empty: nowhere. `free` has the free slots of each node.
    """
    per = job.slots_per_worker
    usable = [node for node in nodes if admits(node, job) and free[node.id] >= per]
    single = [node for node in usable if free[node.id] >= per * workers]
    if single:
        return ((min(single, key=lambda node: (free[node.id], node.id)).id, workers),)
    left, chosen = workers, []
    rest = sorted(usable, key=lambda node: (-free[node.id], node.id))
    while rest and left:
        fitting = [node for node in rest if free[node.id] >= per * left]
        node = min(fitting, key=lambda node: (free[node.id], node.id)) if fitting else rest[0]
        rest.remove(node)
        taken = min(free[node.id] // per, left)
        chosen.append((node.id, taken))
        left -= taken
    return tuple(chosen) if not left else ()
