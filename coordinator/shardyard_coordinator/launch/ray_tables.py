"""Reads rows of Ray's tables of nodes and actors; the caller fetches the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardyard_coordinator.launch.frames import Header

Row = Mapping[str, Any]


def living(nodes: Iterable[Row]) -> dict[str, Row]:
    """The living nodes, by their ids."""
    return {node["NodeID"]: node for node in nodes if node["Alive"]}


def node_of(node: Row, free: Mapping[str, float] | None) -> Header:
    """A node as the agent reports it. `free` are its available resources; without them its use is unknown."""
    resources, labels = node["Resources"], node.get("Labels", {})
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    return {
        "id": node["NodeID"],
        "address": node["NodeManagerAddress"],
        "cpus": cpus,
        "gpus": gpus,
        "memory_bytes": int(resources.get("memory", 0)),
        "accelerator": labels.get("ray.io/accelerator-type", ""),
        "used_cpus": 0 if free is None else cpus - min(int(free.get("CPU", 0)), cpus),
        "used_gpus": 0 if free is None else gpus - min(int(free.get("GPU", 0)), gpus),
    }


def place_of(actors: Sequence[Row], name: str) -> str:
    """Process and node of the newest actor with this name, in words; empty if there is none."""
    found = [actor for actor in actors if actor["Name"] == name]
    return f", process {found[-1]['Pid']} on node {found[-1]['Address']['NodeID'][:12]}," if found else ""


def processes_of(actors: Sequence[Row], name: str, *, children: str, nodes: Mapping[str, Row]) -> dict[str, list[int]]:
    """{node: process ids} of actors with this name and of their children, dead or alive, on these nodes.

    `children` is the class of the actors that they start.
    """
    found: dict[str, list[int]] = {}
    for parent in [actor for actor in actors if actor["Name"] == name]:
        for actor in [parent, *(other for other in actors if _is_child(other, parent, children))]:
            node = actor["Address"]["NodeID"]
            if actor["Pid"] and node in nodes:
                found.setdefault(node, []).append(actor["Pid"])
    return found


def _is_child(actor: Row, parent: Row, kind: str) -> bool:
    """Recognises children by their owner's address; a later actor may have reused the port."""
    until_ms = parent["EndTime"] or math.inf
    return bool(
        actor["ActorClassName"] == kind
        and actor["OwnerAddress"] == parent["Address"]
        and parent["StartTime"] <= actor["StartTime"] <= until_ms
    )
