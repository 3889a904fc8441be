"""Who is at the other end of an HTTP connection: its address, and whom its client certificate names.

The service has to know both for its limits and its audit log. Headers such as `x-forwarded-for` are not read: anybody
can send them.
"""

from __future__ import annotations

import asyncio
import ssl
from contextvars import ContextVar
from typing import Any, NamedTuple

from shardyard_coordinator.serve.certificates import Holder, holder_of
from shardyard_coordinator.serve.origin import peer_of
from shardyard_coordinator.web.front import App, Receive, Scope, Send
from shardyard_coordinator.web.patience import PatientProtocol


class Caller(NamedTuple):
    """The address in gRPC's form, and the holder of the certificate; None: the connection has none."""

    peer: str
    holder: Holder | None


_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Of the request that is being answered."""
    return _caller.get()


class KnownProtocol(PatientProtocol):
    """HTTP/1.1 whose requests know their caller."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Looks at the connection once, for all of its requests."""
        super().connection_made(transport)
        host, port = self.client or ("", 0)
        self.app = _Known(self.app, Caller(peer_of(host, port), _holder(transport.get_extra_info("ssl_object"))))


class _Known:
    """An application whose requests all have one caller."""

    def __init__(self, app: Any, found: Caller) -> None:
        self._app: App = app
        self._found = found

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, which is a task of its own."""
        _caller.set(self._found)
        await self._app(scope, receive, send)


def _holder(connection: ssl.SSLObject | None) -> Holder | None:
    der = None if connection is None else connection.getpeercert(binary_form=True)
    return None if der is None else holder_of(ssl.DER_cert_to_PEM_cert(der).encode())
