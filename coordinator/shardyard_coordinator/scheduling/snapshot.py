"""What a decision looks at, loaded: rows of the store and the cluster as it is."""

from __future__ import annotations

from collections.abc import Sequence

from shardyard_coordinator.domain.records import AttemptRecord, QueuedJob
from shardyard_coordinator.launch.node_shape import gpu_kind, largest_gpu_kind
from shardyard_coordinator.launch.protocols import ClusterView, Node
from shardyard_coordinator.scheduling.policy import CPU, NodeInfo, PendingJob, RunningJob, Snapshot

# Longer than any back-off: a wall clock that was set back holds nobody longer.
_MAX_WAIT_S = 300


def load_snapshot(
    queued: Sequence[QueuedJob], live: Sequence[AttemptRecord], view: ClusterView, now_us: int
) -> Snapshot:
    """The snapshot; without a connection there are no nodes."""
    now = now_us // 1_000_000
    return Snapshot(
        pending=tuple(_pending(job, view, now) for job in queued),
        running=tuple(RunningJob(each.job_uid, each.epoch, each.placement, each.slots_per_worker) for each in live),
        nodes=tuple(NodeInfo(node.id, slots_of(node), _class(node), node.memory_bytes) for node in view.nodes),
        connected=view.connected,
    )


def slots_of(node: Node) -> int:
    """GPUs where a node has any, else CPU cores."""
    return node.gpus or node.cpus


def _class(node: Node) -> str:
    return gpu_kind(node) if node.gpus else CPU


def _pending(job: QueuedJob, view: ClusterView, now: int) -> PendingJob:
    wants = largest_gpu_kind(view.nodes) if job.gpus_per_worker else CPU
    return PendingJob(
        job=job.uid,
        order=job.id,
        epoch=job.epoch,
        sizes=(job.workers,),
        slots_per_worker=job.slots_per_worker,
        accelerator=wants,
        queue=job.queue,
        user=job.creator,
        priority=job.priority,
        not_before=min(job.not_before_us // 1_000_000, now + _MAX_WAIT_S),
        waiting_since=job.waiting_us // 1_000_000,
    )
