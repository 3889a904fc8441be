"""The connection to one service: channel, stubs, and conversion of every error to the SDK's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

import grpc

from shardyard._async import runtime
from shardyard._names import parent_name
from shardyard._reach import Reach, TokenFile, pem_files
from shardyard._retry import (
    Patience,
    channel_options,
    log_retry,
    put_off_s,
    retry_delay,
)
from shardyard.errors import FailedPrecondition, Unavailable, from_rpc
from shardyard.v1 import (
    audit_service_pb2,
    audit_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    log_service_pb2_grpc,
    metric_service_pb2,
    metric_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)

T = TypeVar("T")

_MODULES: Final = (
    audit_service_pb2,
    auth_service_pb2,
    checkpoint_service_pb2,
    dataset_service_pb2,
    event_service_pb2,
    job_service_pb2,
    metric_service_pb2,
    model_service_pb2,
    server_service_pb2,
    webhook_service_pb2,
)


_ONCE: Final = ("CreateToken", "Delete", "Rotate")


class AsyncConnection:
    """Channel and stubs; `call` is for unary methods, `streaming` for those that answer with a stream."""

    def __init__(
        self,
        reach: Reach,
        *,
        timeout: float,
        reconnect_for: float,
    ) -> None:
        self.address = reach.address
        self.project = reach.project
        self.parent = parent_name(reach.project)
        self.timeout = timeout
        self.reconnect_for = reconnect_for
        self._token = reach.token
        self._token_file = TokenFile(reach.token_file) if reach.token_file is not None else None
        self._is_closed = False
        options = channel_options(self.address, _repeatable_methods())
        if reach.is_encrypted:
            credentials = grpc.ssl_channel_credentials(*pem_files(reach))
            self._channel = runtime.open_secure_channel(self.address, credentials, options=options)
        else:
            self._channel = runtime.open_channel(self.address, options=options)
        self.jobs = job_service_pb2_grpc.JobServiceStub(self._channel)
        self.logs = log_service_pb2_grpc.LogServiceStub(self._channel)
        self.metrics = metric_service_pb2_grpc.MetricServiceStub(self._channel)
        self.checkpoints = checkpoint_service_pb2_grpc.CheckpointServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self.datasets = dataset_service_pb2_grpc.DatasetServiceStub(self._channel)
        self.events = event_service_pb2_grpc.EventServiceStub(self._channel)
        self.webhooks = webhook_service_pb2_grpc.WebhookServiceStub(self._channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(self._channel)
        self.auth = auth_service_pb2_grpc.AuthServiceStub(self._channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(self._channel)
        # Without generated code: its request is empty, and its answer is one field of one byte.
        self.check_health = self._channel.unary_unary("/grpc.health.v1.Health/Check")

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = self._token_file.read() if self._token_file is not None else self._token
        return (("authorization", f"Bearer {token}"),) if token else ()

    async def close(self) -> None:
        """Close the channel; streams that are open end."""
        self._is_closed = True
        await self._channel.close()

    async def call(self, method: Any, request: Any, *, timeout: float | None = None) -> Any:
        """Make a unary call, and repeat it if the service asks for it.

        Raises: RequestError.
        """
        self._check_open()
        limit = self.timeout if timeout is None else timeout
        start = time.monotonic()
        has_logged = False
        while True:
            try:
                return await method(request, timeout=limit, metadata=self._metadata)
            except grpc.RpcError as error:
                ours = from_rpc(error, address=self.address)
                delay = retry_delay(ours, time.monotonic() - start, self.reconnect_for)
                if delay is None:
                    raise ours from None
                if not has_logged:
                    has_logged = True
                    log_retry(ours, put_off_s(self.reconnect_for))
            await runtime.sleep(delay)

    async def call_patiently(self, method: Any, request: Any, *, timeout: float | None = None) -> Any:
        """Make a read-only unary call, repeated while the service does not answer.

        Raises: RequestError; Unavailable after `reconnect_for` seconds.
        """
        patience = self.patience()
        while True:
            try:
                return await self.call(method, request, timeout=timeout)
            except Unavailable as error:
                delay = patience.after(error)
            await runtime.sleep(delay)

    async def streaming(
        self, method: Any, make_request: Callable[[], Any], is_over: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[Any]:
        """Messages of a stream that is opened again, with a new request, whenever it breaks.

        `make_request` knows the cursor; `is_over` says that nothing is left, so that a break at the end is ignored.
        Raises: RequestError if opening it again would not help, or did not for `reconnect_for` seconds.
        """
        self._check_open()
        patience = self.patience()
        while True:
            call = method(make_request(), metadata=self._metadata)
            try:
                async for message in call:
                    patience.progressed()
                    yield message
                return
            except grpc.RpcError as error:
                if is_over():
                    return
                delay = patience.after(error)
            finally:
                call.cancel()
            await runtime.sleep(delay)

    def _check_open(self) -> None:
        if self._is_closed:
            raise FailedPrecondition("the client is closed; make another one", reason="CLIENT_CLOSED")

    async def upload(self, method: Any, messages: Any) -> Any:
        """Make a client-streaming call.

        Raises: grpc.RpcError, for the caller to decide whether to continue from what arrived.
        """
        self._check_open()
        return await method(messages, metadata=self._metadata)

    def patience(self) -> Patience:
        """The patience for reopening one stream."""
        return Patience(self.reconnect_for, self.address)


def _repeatable_methods() -> list[tuple[str, str]]:
    """Unary methods that are safe to call twice: all but Delete, which would answer NOT_FOUND the second time, Rotate,
    which would replace the secret that nobody has seen yet, and CreateToken, which would make two.
    """
    return [
        (service.full_name, method.name)
        for module in _MODULES
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if not (method.client_streaming or method.server_streaming or method.name.startswith(_ONCE))
    ]
