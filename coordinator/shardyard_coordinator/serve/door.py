"""The port, bound before the store is open; until then its health says that no call is served.

A call that arrives before the services are ready waits briefly, then gets UNAVAILABLE STARTING with a delay.
Health and reflection answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.call import Behaviour, Call, Service
from shardyard_coordinator.serve.guard import GuardedServer
from shardyard_coordinator.serve.health import Health
from shardyard_coordinator.serve.starting import until_ready

_Real = Mapping[str, Mapping[str, Behaviour]]


class Late:
    """Services whose behaviours come later, by `open`."""

    def __init__(self, descriptors: Iterable[ServiceDescriptor]) -> None:
        self._real: asyncio.Future[_Real] = asyncio.get_running_loop().create_future()
        self._descriptors = tuple(descriptors)

    @property
    def services(self) -> list[Service]:
        """Services with the same methods, which hold or refuse calls until `open`."""
        return [
            _LateService(each.full_name, {method.name: self._behaviour(method) for method in each.methods})
            for each in self._descriptors
        ]

    def open(self, services: Iterable[Service]) -> None:
        """Serves all calls, also those that wait; KeyError if a method has no behaviour."""
        real = {service.full_name: service.behaviours() for service in services}
        for each in self._descriptors:
            for method in each.methods:
                real[each.full_name][method.name]
        self._real.set_result(real)

    def _behaviour(self, method: MethodDescriptor) -> Behaviour:
        service, name = method.containing_service.full_name, method.name

        async def answer(request: Any, call: Call) -> Message:
            real = (await self._opened(call))[service][name]
            return await cast(Callable[[Any, Call], Awaitable[Message]], real)(request, call)

        async def answers(request: Any, call: Call) -> AsyncIterator[Message | bytes]:
            real = (await self._opened(call))[service][name]
            stream = cast(Callable[[Any, Call], AsyncGenerator[Message | bytes, None]], real)(request, call)
            async with contextlib.aclosing(stream):
                async for each in stream:
                    yield each

        return answers if method.server_streaming else answer

    async def _opened(self, call: Call) -> _Real:
        await until_ready(self._real, call)
        return self._real.result()


@dataclass
class _LateService:
    """A service as the guard sees it."""

    full_name: str
    made: Mapping[str, Behaviour]

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return self.made


@dataclass(frozen=True)
class Door:
    """The server, its health, who is let in, and the services, once `late` is open."""

    server: GuardedServer
    health: Health
    late: Late
    access: Access

    async def start(
        self, address: str, credentials: grpc.ServerCredentials | None = None, *, http: Path | None = None
    ) -> int:
        """Binds, begins to answer, returns the port; with credentials by TLS alone. `http` is the HTTP door's socket.

        Raises: OSError if the address is taken or not this machine's.
        """
        port = self.server.bind(address, credentials)
        if http is not None:
            self.server.bind_door(http)
        await self.server.start()
        return port

    async def close(self) -> None:
        """Stops answering at once, after a failed start. Idempotent."""
        await self.server.stop(0)
