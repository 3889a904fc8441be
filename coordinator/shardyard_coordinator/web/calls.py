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
from shardyard_coordinator.serve.origin import claim
from shardyard_coordinator.web.bodies import Bodies, Body
from shardyard_coordinator.web.callers import caller
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
    """Calls over the service's socket for the door, with its secret. Made inside the loop that uses it."""

    def __init__(self, path: str, secret: str) -> None:
        self._bodies = Bodies()
        self._line = _Line(path, secret)

    async def close(self) -> None:
        """Ends all calls."""
        await self._line.close()

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
            stub = health_pb2_grpc.HealthStub(self._line.channel())
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0, metadata=(self._line.claim(),))
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _endpoint(self, method: MethodDescriptor) -> Any:
        path = f"/{method.containing_service.full_name}/{method.name}"
        takes, gives = (message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type))
        one = _Method(path, takes, gives, self._bodies, self._line)
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
        line: _Line,
    ) -> None:
        self._path = path
        self._takes = takes
        self._gives = gives
        self._bodies = bodies
        self._line = line

    async def unary(self, body: Body, context: RequestContext[Any, Any]) -> bytes:
        """One request, one answer."""
        request = await self._bodies.to_service(body, self._takes)
        try:
            answer = await self._line.channel().unary_unary(self._path)(request, **self._line.terms(context))
        except grpc.aio.AioRpcError as error:
            raise connect_error(error) from None
        return await self._bodies.to_client(answer, self._gives, is_json=body.is_json)

    async def answers(self, body: Body, context: RequestContext[Any, Any]) -> AsyncIterator[bytes]:
        """One request, a stream of answers."""
        request = await self._bodies.to_service(body, self._takes)
        call = self._line.channel().unary_stream(self._path)(request, **self._line.terms(context))
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
            answer = await self._line.channel().stream_unary(self._path)(requests(), **self._line.terms(context))
        except grpc.aio.AioRpcError as error:
            raise fault or connect_error(error) from None
        except asyncio.CancelledError:
            if fault is not None:
                raise fault from None
            raise
        return await self._bodies.to_client(answer, self._gives, is_json=is_json)


class _Line:
    """Connections to the service, and what a call says on them of its caller."""

    def __init__(self, path: str, secret: str) -> None:
        self._secret = secret
        # Several, because the calls of one share its flow control.
        self._channels: Sequence[grpc.aio.Channel] = [
            grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS) for _ in range(_CHANNELS)
        ]

    async def close(self) -> None:
        """Ends all calls."""
        for channel in self._channels:
            await channel.close()

    def channel(self) -> grpc.aio.Channel:
        """The one of the caller's connection."""
        return self._channels[hash(caller().peer) % len(self._channels)]

    def claim(self) -> tuple[str, bytes]:
        """By which the service knows the door, and whose call it makes."""
        return claim(self._secret, *caller())

    def terms(self, context: RequestContext[Any, Any]) -> dict[str, Any]:
        """Deadline and metadata of a call. Raises: ConnectError for headers that are not text."""
        given = [(name, context.request_headers.get(name)) for name in PASSED_ON]
        passed = [(name, value) for name, value in given if value]
        if not all(value.isascii() and value.isprintable() for _, value in passed):
            text = f"the headers {', '.join(PASSED_ON)} are printable ASCII; send that"
            raise ConnectError(Code.INVALID_ARGUMENT, text)
        left_ms = context.timeout_ms
        return {"metadata": (*passed, self.claim()), "timeout": None if left_ms is None else max(left_ms / 1000, 0.0)}
