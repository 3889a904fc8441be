"""grpc.health.v1, served through the guard like everything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from grpc_health.v1 import health_pb2

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.call import Behaviour, Call

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The health of the service and of each of its parts, which is the same for all."""

    full_name = "grpc.health.v1.Health"

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services) | {""}
        self._serving = False
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_serving(self) -> bool:
        """Whether calls are served."""
        return self._serving

    def set_serving(self, serving: bool) -> None:
        """Changes the status and notifies every watcher."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {"Check": self.check, "Watch": self.watch}

    async def check(self, request: Any, _call: Call) -> Any:
        """Returns the health of a service."""
        if request.service not in self._services:
            raise Refused(
                Reason.SERVICE_NOT_FOUND, f"there is no service `{request.service[:80]}`; list them by reflection"
            )
        return health_pb2.HealthCheckResponse(status=_SERVING if self._serving else _NOT_SERVING)

    async def watch(self, request: Any, _call: Call) -> AsyncIterator[Any]:
        """Sends a service's health now and at each change; SERVICE_UNKNOWN for an unknown one."""
        while True:
            status = _SERVING if self._serving else _NOT_SERVING
            changed = self._changed
            yield health_pb2.HealthCheckResponse(status=status if request.service in self._services else _UNKNOWN)
            await asyncio.shield(changed)
