"""The resources of one node of a job's gang, as the nodes report them: the same numbers for planner and ranks.

A job does not name a kind of node: without GPUs it runs on nodes that have none, and with GPUs on the kind of which the
cluster has the most. Every number holds on each node that the gang may get.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.protocols import ClusterView, Node

GPU = "gpu"

# Ampere: earlier GPUs only emulate bfloat16, slower than fp32.
_BF16_CAPABILITY = 8.0


def gpus_of_worker(view: ClusterView, asked: int | None) -> int:
    """GPUs of one worker; None leaves it to the service, which takes one if the cluster has some."""
    return asked if asked is not None else int(any(node.gpus for node in view.nodes))


def planning_shape(view: ClusterView, gpus_per_worker: int) -> worker_pb2.NodeShape:
    """The largest node that a job may run on; empty if no node is known."""
    wanted = nodes_for(view.nodes, with_gpus=gpus_per_worker > 0)
    nodes = [node for node in wanted if node.gpus >= gpus_per_worker] or wanted or list(view.nodes)
    if not nodes:
        return worker_pb2.NodeShape()
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus, node.memory_bytes))
    return _shape(largest, nodes)


def launch_shape(view: ClusterView, placement: Sequence[tuple[str, int]]) -> worker_pb2.NodeShape:
    """The node with the least memory of those that a gang was placed on; empty if none of them is known."""
    used = {node for node, _ in placement}
    nodes = [node for node in view.nodes if node.id in used]
    if not nodes:
        return worker_pb2.NodeShape()
    return _shape(min(nodes, key=lambda node: node.memory_bytes), nodes)


def nodes_for(nodes: Sequence[Node], *, with_gpus: bool) -> list[Node]:
    """The nodes that a job may run on: those without GPUs, or those of the kind of which there are the most GPUs."""
    if not with_gpus:
        return [node for node in nodes if not node.gpus]
    kind = largest_gpu_kind(nodes)
    return [node for node in nodes if node.gpus and gpu_kind(node) == kind]


def largest_gpu_kind(nodes: Sequence[Node]) -> str:
    """The kind of GPU that the cluster has the most of; of equal ones the first by name."""
    counts: dict[str, int] = {}
    for node in nodes:
        if node.gpus:
            counts[gpu_kind(node)] = counts.get(gpu_kind(node), 0) + node.gpus
    return min(counts, key=lambda kind: (-counts[kind], kind)) if counts else GPU


def gpu_kind(node: Node) -> str:
    """The scheduler's name for the node's GPUs."""
    return node.accelerator or GPU


def _shape(node: Node, alike: Sequence[Node]) -> worker_pb2.NodeShape:
    """`node`, with the weakest GPUs of the nodes `alike`; one that does not report its GPUs makes them unknown."""
    if not node.gpus:
        return worker_pb2.NodeShape(memory_bytes=node.memory_bytes, reserved_bytes=node.reserved_bytes, cpus=node.cpus)
    known = all(each.compute_capability for each in alike)
    weakest = min(alike, key=lambda each: (each.compute_capability, each.gpu_memory_bytes))
    return worker_pb2.NodeShape(
        memory_bytes=node.memory_bytes,
        reserved_bytes=node.reserved_bytes,
        cpus=node.cpus,
        gpus=node.gpus,
        gpu_memory_bytes=min(each.gpu_memory_bytes for each in alike),
        bf16=known and weakest.compute_capability >= _BF16_CAPABILITY,
        gpu_name=weakest.gpu_name if known else "",
    )
