"""The methods of the services as endpoints of Connect, each of which makes the same call to the service itself.

So an HTTP client meets the same rules, limits and errors as any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, cast

import grpc
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import Endpoint
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from shardyard.v1 import (
    audit_service_pb2,
    auth_service_pb2,
    checkpoint_service_pb2,
    dataset_service_pb2,
    event_service_pb2,
    job_service_pb2,
    log_service_pb2,
    metric_service_pb2,
    model_service_pb2,
    server_service_pb2,
    webhook_service_pb2,
)
from shardyard_coordinator.web.bodies import Bodies, Body
from shardyard_coordinator.web.failures import connect_error

FILES = (
    job_service_pb2.DESCRIPTOR,
    log_service_pb2.DESCRIPTOR,
    metric_service_pb2.DESCRIPTOR,
    checkpoint_service_pb2.DESCRIPTOR,
    model_service_pb2.DESCRIPTOR,
    dataset_service_pb2.DESCRIPTOR,
    event_service_pb2.DESCRIPTOR,
    webhook_service_pb2.DESCRIPTOR,
    server_service_pb2.DESCRIPTOR,
    auth_service_pb2.DESCRIPTOR,
    audit_service_pb2.DESCRIPTOR,
)
"""Where the services are described."""

PASSED_ON = ("authorization", "traceparent", "tracestate")
"""Headers that the service reads."""

_KINDS = {
    (False, False): StreamType.UNARY,
    (False, True): StreamType.SERVER_STREAM,
    (True, False): StreamType.CLIENT_STREAM,
}
_CHANNELS = 16
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    ("grpc.enable_retries", 0),
)


def services() -> Iterator[ServiceDescriptor]:
    """Every service that is reached by HTTP."""
    for file in FILES:
        yield from file.services_by_name.values()


class Calls:
    """Calls to the service at an address. Made inside the loop that uses it."""

    def __init__(self, address: str) -> None:
        self._bodies = Bodies()
        # Several connections: the service takes turns among those who ask for answers of models by their connection.
        self._channels: Sequence[grpc.aio.Channel] = [
            grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(_CHANNELS)
        ]

    async def close(self) -> None:
        """Ends all calls."""
        for channel in self._channels:
            await channel.close()

    def endpoints(self) -> Mapping[str, Any]:
        """All methods by their paths."""
        found = {}
        for service in services():
            for method in service.methods:
                found[f"/{service.full_name}/{method.name}"] = self._endpoint(method)
        return found

    async def is_serving(self) -> bool:
        """Whether the service's own health says so."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        try:
            stub = health_pb2_grpc.HealthStub(self._channels[0])
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _endpoint(self, method: MethodDescriptor) -> Any:
        path = f"/{method.containing_service.full_name}/{method.name}"
        takes, gives = (message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type))
        one = _Method(path, takes, gives, self._bodies, self._channels)
        kind = _KINDS[method.client_streaming, method.server_streaming]
        described: MethodInfo[Any, Any] = MethodInfo(
            name=method.name,
            service_name=method.containing_service.full_name,
            input=takes,
            output=gives,
            # Not read by GET: what a browser loads by itself must not reach the service.
            idempotency_level=IdempotencyLevel.UNKNOWN,
            stream_type=kind,
        )
        if kind is StreamType.UNARY:
            return Endpoint.unary(described, cast(Any, one.unary))
        if kind is StreamType.SERVER_STREAM:
            return Endpoint.server_stream(described, cast(Any, one.answers))
        return Endpoint.client_stream(described, cast(Any, one.collect))


class _Method:
    """One method, in the shapes that the services have."""

    def __init__(
        self,
        path: str,
        takes: type[Message],
        gives: type[Message],
        bodies: Bodies,
        channels: Sequence[grpc.aio.Channel],
    ) -> None:
        self._path = path
        self._takes = takes
        self._gives = gives
        self._bodies = bodies
        self._channels = channels

    async def unary(self, body: Body, context: RequestContext[Any, Any]) -> bytes:
        """One request, one answer."""
        request = await self._bodies.to_service(body, self._takes)
        try:
            answer = await self._channel(context).unary_unary(self._path)(request, **_terms(context))
        except grpc.aio.AioRpcError as error:
            raise connect_error(error) from None
        return await self._bodies.to_client(answer, self._gives, is_json=body.is_json)

    async def answers(self, body: Body, context: RequestContext[Any, Any]) -> AsyncIterator[bytes]:
        """One request, a stream of answers."""
        request = await self._bodies.to_service(body, self._takes)
        call = self._channel(context).unary_stream(self._path)(request, **_terms(context))
        try:
            async for answer in call:
                yield await self._bodies.to_client(answer, self._gives, is_json=body.is_json)
        except grpc.aio.AioRpcError as error:
            raise connect_error(error) from None
        finally:
            call.cancel()

    async def collect(self, bodies: AsyncIterator[Body], context: RequestContext[Any, Any]) -> bytes:
        """A stream of requests, one answer."""
        is_json, fault = False, None

        async def requests() -> AsyncIterator[bytes]:
            nonlocal is_json, fault
            try:
                async for body in bodies:
                    is_json = body.is_json
                    yield await self._bodies.to_service(body, self._takes)
            except ConnectError as error:
                fault = error  # grpc would only say that the call was cancelled.
                raise

        try:
            answer = await self._channel(context).stream_unary(self._path)(requests(), **_terms(context))
        except grpc.aio.AioRpcError as error:
            raise fault or connect_error(error) from None
        except asyncio.CancelledError:
            if fault is not None:
                raise fault from None
            raise
        return await self._bodies.to_client(answer, self._gives, is_json=is_json)

    def _channel(self, context: RequestContext[Any, Any]) -> grpc.aio.Channel:
        """The one of the client's machine."""
        host = (context.client_address or "").rpartition(":")[0]
        return self._channels[hash(host) % len(self._channels)]


def _terms(context: RequestContext[Any, Any]) -> dict[str, Any]:
    """Deadline and metadata of a call. Raises: ConnectError for headers that are not text."""
    given = [(name, context.request_headers.get(name)) for name in PASSED_ON]
    metadata = tuple((name, value) for name, value in given if value)
    if not all(value.isascii() and value.isprintable() for _, value in metadata):
        raise ConnectError(Code.INVALID_ARGUMENT, f"the headers {', '.join(PASSED_ON)} are printable ASCII; send that")
    left_ms = context.timeout_ms
    return {"metadata": metadata, "timeout": None if left_ms is None else max(left_ms / 1000, 0.0)}
