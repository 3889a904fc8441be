"""Loads the snapshot for a decision from rows of the store and the current cluster."""

from __future__ import annotations

from collections.abc import Sequence

from shardyard_coordinator.domain.records import HeldSlots, LineJob, QueuedJob
from shardyard_coordinator.launch.node_shape import gpu_kind, largest_gpu_kind
from shardyard_coordinator.launch.protocols import ClusterView, Node
from shardyard_coordinator.scheduling.policy import CPU, NodeInfo, PendingJob, RunningJob, Snapshot

# The longest back-off. A later time was written before the wall clock was set back, and is ignored.
_MAX_WAIT_S = 300


def load_snapshot(
    queued: Sequence[QueuedJob | LineJob], live: Sequence[HeldSlots], view: ClusterView, now_us: int
) -> Snapshot:
    """The snapshot; without a connection there are no nodes."""
    return Snapshot(
        pending=pending_jobs(queued, view, now_us),
        running=tuple(RunningJob(each.job_uid, each.epoch, each.placement, each.slots_per_worker) for each in live),
        nodes=tuple(_info(node) for node in view.nodes),
        connected=view.connected,
    )


def pending_jobs(queued: Sequence[QueuedJob | LineJob], view: ClusterView, now_us: int) -> tuple[PendingJob, ...]:
    """Waiting jobs in the form of the policy, named by their row ids."""
    now = now_us // 1_000_000
    # Counted once for all jobs.
    most = largest_gpu_kind(view.nodes)
    return tuple(
        PendingJob(
            job=str(job.id),
            order=job.id,
            epoch=0,
            sizes=(job.workers,),
            slots_per_worker=job.gpus_per_worker or job.cpus_per_worker,
            accelerator=most if job.gpus_per_worker else CPU,
            priority=job.priority,
            not_before=not_before if (not_before := job.not_before_us // 1_000_000) <= now + _MAX_WAIT_S else 0,
        )
        for job in queued
    )


def slots_of(node: Node) -> int:
    """GPUs if a node has any, else CPU cores."""
    return node.gpus or node.cpus


def _info(node: Node) -> NodeInfo:
    used = node.used_gpus if node.gpus else node.used_cpus
    return NodeInfo(node.id, slots_of(node), _class(node), node.memory_bytes, used=used)


def _class(node: Node) -> str:
    return gpu_kind(node) if node.gpus else CPU
