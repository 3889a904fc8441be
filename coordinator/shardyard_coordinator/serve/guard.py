"""Every call of every service passes the guard, which turns every error into a status with its reason.

Handlers get bytes from grpc.aio (no deserializer) and are parsed here: bare aio answers undecodable bytes and
exceptions with UNKNOWN and their text. The order: deadline, where the call comes from, authentication, whether the
caller may call the method anywhere, in-flight limits, parsing, validation, whether it may in the project that the
request names, the method itself. Denials are recorded. An exception's text goes to the log only, under an id that the
caller gets.

The fields of a message are counted before it is parsed. A message of more than a thousand fields, or of much text, is
parsed and validated in one thread beside the loop, one after the other, so that other calls are served meanwhile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import grpc
from google.protobuf.message import Message

from shardyard_coordinator.domain.access import ANONYMOUS
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.log_context import logged_about
from shardyard_coordinator.serve import status
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.call import Call, Method
from shardyard_coordinator.serve.limits import InFlight, Limits, is_waiting
from shardyard_coordinator.serve.observed import UNKNOWN_METHOD, NullObserver, Observer, Outcome
from shardyard_coordinator.serve.openings import Openings
from shardyard_coordinator.serve.origin import Origins
from shardyard_coordinator.serve.reading import Requests, Validate
from shardyard_coordinator.serve.validation.naming import resource_of

log = logging.getLogger(__name__)

_LOOK_S: Final = 1.0


def transport_options(limits: Limits) -> list[tuple[str, int]]:
    """Options of the server: without `so_reuseport=0` two servers bind the same port without an error."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        # Without these the transport ends calls of a burst without a reason.
        ("grpc.server.max_pending_requests", limits.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", 2 * limits.max_pending_calls),
        ("grpc.server_max_unrequested_time_in_server", 120),  # Seconds.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", 2 * limits.max_metadata_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


class GuardedServer:
    """A grpc.aio server whose every method is guarded, and which can drain: its streams end with DRAINING."""

    def __init__(
        self,
        methods: Iterable[Method],
        validate: Validate,
        limits: Limits,
        access: Access,
        observer: Observer | None = None,
    ) -> None:
        self._origins = Origins()
        guard = Guard(validate, limits, access, observer or NullObserver(), self._origins)
        self._guard = guard
        self._server = grpc.aio.server(
            options=transport_options(limits), handlers=(_Table({each.path: each for each in methods}, guard),)
        )

    def bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Binds and returns the port; with credentials by TLS alone.

        Raises: OSError if the address is taken or not this machine's.
        """
        try:
            if credentials is None:
                port = cast(int, self._server.add_insecure_port(address))
            else:
                port = cast(int, self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise OSError(_no_port(address)) from error
        if port == 0:
            raise OSError(_no_port(address))
        return port

    def bind_door(self, path: Path) -> None:
        """Binds the socket of the HTTP door, at a path of at most 107 bytes; before `start`. Raises: OSError."""
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {path}, the socket of --http; look at its folder") from error

    @property
    def secret(self) -> str:
        """By which the HTTP door proves what it is."""
        return self._origins.secret

    async def start(self) -> None:
        """Starts listening and serving."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Ends every stream with DRAINING, lets unary calls finish for `grace_s`, then stops."""
        self._guard.drain()
        await self._server.stop(grace_s)
        self._guard.close()


class _Table(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds a call's handler by its path."""

    def __init__(self, methods: dict[str, Method], guard: Guard) -> None:
        self._handlers = {path: guard.handler(method) for path, method in methods.items()}
        self._unknown = grpc.stream_stream_rpc_method_handler(guard.unknown)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handlers.get(handler_call_details.method, self._unknown)


class Guard:
    """Runs behaviours, and turns their errors into statuses."""

    def __init__(
        self, validate: Validate, limits: Limits, access: Access, observer: Observer, origins: Origins
    ) -> None:
        self._observer = observer
        self._requests = Requests(validate, limits)
        self._access = access
        self._origins = origins
        self._limits = limits
        self._in_flight = InFlight(limits)
        self._openings = Openings()
        self._streams: dict[asyncio.Task[Any], _Held] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._draining = False
        self._calls = itertools.count(1)
        self._run = secrets.token_hex(4)

    def drain(self) -> None:
        """Ends every stream, and every later one, with DRAINING."""
        self._draining = True
        for task in self._streams:
            task.cancel()

    def close(self) -> None:
        """Ends the thread for large messages, and the looks at streams."""
        if self._looking is not None:
            self._looking.cancel()
        self._requests.close()

    def handler(self, method: Method) -> grpc.RpcMethodHandler:
        """The guarded grpc handler of a method: bytes in, bytes out."""
        if not method.client_streaming and not method.server_streaming:
            return grpc.unary_unary_rpc_method_handler(self._unary(method))
        make = {
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        return make(self._stream(method))

    async def unknown(self, _requests: Any, context: grpc.aio.ServicerContext) -> None:
        """Answers a path that no service has."""
        call = self._call(UNKNOWN_METHOD, context, None)
        with self._observed(call, context) as outcome:
            text = "there is no such method; list the services by reflection"
            outcome.refused = Refused(Reason.METHOD_UNKNOWN, text)
            await _abort(context, outcome.refused)

    def _unary(self, method: Method) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
        behaviour = cast(Callable[[Any, Call], Awaitable[Message]], method.behaviour)

        async def handle(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            call = self._call(method.path, context, self._limits.unary_timeout_s)
            with self._observed(call, context) as outcome:
                call = dataclasses.replace(call, traceparent=outcome.traceparent) if outcome.traceparent else call
                try:
                    call = self._origins.locate(call, context)
                    call = await self._access.admit(call, context.invocation_metadata())
                    outcome.principal = call.principal
                    self._access.check_method(call)
                    with self._in_flight.unary(method.path, call.principal or call.host):
                        async with asyncio.timeout_at(call.deadline_s):
                            request = await self._requests.read(method, data)
                            call = _naming(call, request)
                            call = self._access.check(call)
                            answer = (await behaviour(request, call)).SerializeToString()
                    if is_waiting(method.path) and (refusal := self._access.verdict(call)) is not None:
                        raise refusal  # It is not the one any more that it was when the wait began.
                    return answer
                except Refused as error:
                    refused = error
                except TimeoutError:
                    refused = Refused(Reason.DEADLINE_EXCEEDED, "the call's deadline passed; its effect is not known")
                except Exception:  # The edge: nothing of an unexpected exception may reach the caller.
                    refused = _unexpected(call)
                outcome.refused = refused
                await self._access.note(call, refused)
                await _abort(context, refused)
            raise AssertionError("abort returned")

        return handle

    def _stream(self, method: Method) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[bytes | None]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext) -> bytes | None:
            task = cast(asyncio.Task[Any], asyncio.current_task())
            held = self._streams[task] = _Held(self._call(method.path, context, None))
            with self._observed(held.call, context) as outcome:
                try:
                    held.call = self._origins.locate(held.call, context)
                    held.call = await self._access.admit(held.call, context.invocation_metadata())
                    outcome.principal = held.call.principal
                    self._access.check_method(held.call)
                    if self._draining:
                        raise _draining()
                    self._look_again()
                    with self._in_flight.stream(method.path, held.call.principal or held.call.host):
                        async with self._openings.turn():
                            return await self._run_stream(method, request, held, context)
                except Refused as error:
                    refused = error
                except asyncio.CancelledError:
                    if context.cancelled() or not (self._draining or held.refused):
                        raise
                    task.uncancel()
                    refused = held.refused or _draining()
                except Exception:  # The edge: nothing of an unexpected exception may reach the caller.
                    refused = _unexpected(held.call)
                finally:
                    del self._streams[task]
                outcome.refused = refused
                await self._access.note(held.call, refused)
                await _abort(context, refused)
            raise AssertionError("abort returned")

        return handle

    async def _run_stream(
        self, method: Method, request: Any, held: _Held, context: grpc.aio.ServicerContext
    ) -> bytes | None:
        """Reads and writes by the method's shape; ends the stream if its reader takes nothing for too long."""
        message: Any
        if method.client_streaming:
            message = self._each(method, request, held)
        else:
            message = await self._requests.read(method, request)
            held.call = _naming(held.call, message)
            held.call = self._access.check(held.call)
        if not method.server_streaming:
            behaviour = cast(Callable[[Any, Call], Awaitable[Message]], method.behaviour)
            return (await behaviour(message, held.call)).SerializeToString()
        answers = cast(Callable[[Any, Call], AsyncIterator[Message | bytes]], method.behaviour)(message, held.call)
        try:
            # Sent separately: if a first write times out, grpc.aio believes that the metadata is still unsent, and then
            # cannot send the status.
            await context.send_initial_metadata(())
            async for answer in answers:
                await self._write(context, answer if isinstance(answer, bytes) else answer.SerializeToString())
        finally:
            await cast(Any, answers).aclose()
        return None

    async def _write(self, context: grpc.aio.ServicerContext, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.slow_consumer_s):
                await context.write(data)
        except TimeoutError:
            raise Refused(
                Reason.SLOW_CONSUMER,
                f"nothing was read for {self._limits.slow_consumer_s:g} s; continue from the last cursor",
            ) from None

    async def _each(self, method: Method, requests: AsyncIterator[bytes], held: _Held) -> AsyncIterator[Message]:
        async for data in requests:
            message = await self._requests.read(method, data)
            held.call = _naming(held.call, message)
            if held.call.resource:  # What comes without a header first is refused by the method.
                held.call = self._access.check(held.call)
            yield message

    def _look_again(self) -> None:
        """Looks in a second which streams are not allowed any more: no clock and no message says so earlier."""
        if self._looking is None and self._access.how.is_required:
            self._looking = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = None
        for task, held in self._streams.items():
            if held.refused is None and (refused := self._access.verdict(held.call)) is not None:
                held.refused = refused
                task.cancel()
        if self._streams:
            self._look_again()

    def _observed(self, call: Call, context: grpc.aio.ServicerContext) -> AbstractContextManager[Outcome]:
        # Values of keys that end in -bin are bytes: nothing that is read from here is.
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        return self._observer.call(call, metadata)

    def _call(self, path: str, context: grpc.aio.ServicerContext, default_s: float | None) -> Call:
        remaining = context.time_remaining()
        if remaining is None or remaining > 3e7:  # grpc gives an endless deadline as a huge one.
            remaining = default_s
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        request_id = f"{self._run}-{next(self._calls):x}"
        return Call(path, ANONYMOUS, request_id, deadline, context.peer())


@dataclass
class _Held:
    """A stream that is open; `refused` is why it is being ended, if it is not allowed any more."""

    call: Call
    refused: Refused | None = None


def _naming(call: Call, request: Message) -> Call:
    """The call with the resource that its request names."""
    name = resource_of(request)
    return dataclasses.replace(call, resource=name) if name else call


def _no_port(address: str) -> str:
    return (
        f"cannot listen on {address}: the port is taken, or the address is not this machine's; "
        "choose another one with --listen, or end what listens there (`shardyard stop`)"
    )


def _draining() -> Refused:
    return Refused(
        Reason.DRAINING, "the service is stopping; continue from the last cursor when it is back", retry_after_s=1.0
    )


def _unexpected(call: Call) -> Refused:
    """Logs the exception under a new id, and returns an error with that id."""
    error_id = secrets.token_hex(8)
    with logged_about(error_id=error_id):
        log.exception("error %s in %s, request %s", error_id, call.method, call.request_id)
    message = f"a defect of the service; its log has the details under {error_id}"
    return Refused(Reason.INTERNAL, message, metadata={"error_id": error_id})


async def _abort(context: grpc.aio.ServicerContext, refused: Refused) -> None:
    code, message, trailers = status.encode(refused)
    await context.abort(code, message, trailing_metadata=trailers)
