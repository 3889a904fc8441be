"""RecommendModels: which model to train, ranked by the trainer over its catalogue and the project's own models."""

from __future__ import annotations

import asyncio
import hashlib

from sqlalchemy import Connection

from shardyard.v1 import choosing_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import ResourceKind, ResourceRecord
from shardyard_coordinator.launch.node_shape import gpus_of_worker, planning_shape
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.inspection import Subject
from shardyard_coordinator.serve.parts import Cluster, Parts, in_time, raise_violations
from shardyard_coordinator.store import encode, resources

RECOMMEND_FUNCTION = "shardyard_trainer.choosing.recommend:recommend"
MOST_OWN = 50
"""Models of the project that are candidates, the newest ones: each is built on the meta device."""

_SUBJECT = Subject("task", "the models for this task", Reason.MODEL_INVALID)
_ROUTE = b"choosing"
"""The process that answered is kept for a while, with all models that it has counted."""


class Choosing:
    """Answers which models to train."""

    def __init__(self, parts: Parts, cluster: Cluster) -> None:
        self._parts = parts
        self._cluster = cluster

    async def recommend(
        self, request: choosing_pb2.RecommendModelsRequest, call: Call
    ) -> choosing_pb2.RecommendModelsResponse:
        """Ranks published models and the project's own for a task."""
        parts = self._parts
        project = parts.name("project", request.parent).project
        if request.max_cost and parts.slot_hour_price is None:
            text = "the service knows no price; start it with `--slot-hour-price`, or give max_time instead"
            raise refused_fields([FieldViolation("max_cost", f"`{request.max_cost:g}`: {text}")])
        found = await parts.store.read(lambda conn: _newest(conn, project))
        message = await self._question(request, found)
        data = await asyncio.to_thread(message.SerializeToString, deterministic=True)
        asked = parts.questions.inspect(
            RECOMMEND_FUNCTION, data, call, subject=_SUBJECT, key=hashlib.sha256(data).digest(), route=_ROUTE
        )
        result = worker_pb2.RecommendResult.FromString(await in_time(call, asked))
        raise_violations(result.violations)
        return result.response

    async def _question(
        self, request: choosing_pb2.RecommendModelsRequest, found: list[ResourceRecord]
    ) -> worker_pb2.RecommendRequest:
        parts, view = self._parts, await self._cluster.view()
        shape = planning_shape(view, gpus_of_worker(view, None))
        if request.memory_bytes and shape.gpus:
            shape.gpu_memory_bytes = request.memory_bytes
        elif request.memory_bytes:
            shape.memory_bytes, shape.reserved_bytes = request.memory_bytes, 0
        message = worker_pb2.RecommendRequest(
            request=request,
            node_shape=shape,
            models=[encode.resource_to_model(record) for record in found],
            locations=worker_pb2.Locations(
                folders={record.name: record.path for record in found}, cache_dir=parts.cache_dir
            ),
            currency=parts.currency,
            is_offline=parts.is_offline,
        )
        message.request.task = request.task.replace("-", "_")
        if parts.slot_hour_price is not None:
            message.slot_hour_price = parts.slot_hour_price
        return message


def _newest(conn: Connection, project: str) -> list[ResourceRecord]:
    """The project's newest models that are READY."""
    return resources.list_resources(conn, ResourceKind.MODEL, project, limit=MOST_OWN)
