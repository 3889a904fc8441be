"""ServerService: what this service is, allows and supports."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version

from shardyard.v1 import server_service_pb2 as pb
from shardyard_coordinator.control.spec_walk import tasks
from shardyard_coordinator.launch.protocols import ClusterView
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.parts import Cluster, Parts
from shardyard_coordinator.serve.scrub import scrub
from shardyard_coordinator.serve.storage_look import StorageLook
from shardyard_coordinator.store import encode

VERSION = version("shardyard")
MODEL_FAMILIES = ("bert", "gpt2", "llama", "distilbert", "roberta")


class ServerService:
    """Implements ServerService: what this service is, and its state."""

    full_name = "shardyard.v1.ServerService"

    def __init__(
        self,
        parts: Parts,
        cluster: Cluster,
        *,
        slots: Callable[[ClusterView], Awaitable[tuple[int, int]]],
        warnings: Sequence[str],
        event_retention_days: int,
    ) -> None:
        self._parts = parts
        self._cluster = cluster
        self._storage = StorageLook(parts.storage, parts.claim)
        self._slots = slots
        self._warnings = tuple(warnings)
        self._event_retention_days = event_retention_days
        self._start_us = parts.clock.now_us()

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"GetServerInfo": self.get}

    async def get(self, _request: pb.GetServerInfoRequest, _call: Call) -> pb.ServerInfo:
        """Returns the service's current state."""
        parts = self._parts
        limits = {name: int(value) for name, value in dataclasses.asdict(parts.limits).items()}
        return pb.ServerInfo(
            version=VERSION,
            store_id=parts.store.store_id,
            limits=limits,
            tasks=tasks(),
            model_families=MODEL_FAMILIES,
            event_retention_days=self._event_retention_days,
            cluster=await self._cluster_info(),
            start_time=encode.timestamp(self._start_us),
            warnings=self._warnings,
            data_roots=parts.data_roots,
            confinement=await parts.compute.confinement(),
            storage=await self._storage.info(),
        )

    async def _cluster_info(self) -> pb.ClusterInfo:
        view = await self._cluster.view_now()
        slots, free = await self._slots(view)
        state = pb.ClusterInfo.STATE_CONNECTED if view.connected else pb.ClusterInfo.STATE_CONNECTING
        if not view.connected and view.cluster_id:
            state = pb.ClusterInfo.STATE_UNREACHABLE
        return pb.ClusterInfo(
            state=state,
            launcher=self._parts.launcher.name,
            address=view.address,
            slots=slots,
            free_slots=free,
            gpus=sum(node.gpus for node in view.nodes),
            nodes=len(view.nodes),
            message=scrub(view.message),
        )
