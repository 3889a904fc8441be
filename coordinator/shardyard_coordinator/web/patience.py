"""Connections that are opened and then say nothing, or too little, which uvicorn would never close."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose clients have to send a request in time."""

    request_s = 30.0
    """The longest wait for the head of a request, from the connection's begin or the end of the request before."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is waited for."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Once a request is there, the service's own limits apply."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()

    def on_response_complete(self) -> None:
        """The next request is waited for."""
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._rest()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._rest()
        transport: Any = self.transport
        self._timer = asyncio.get_running_loop().call_later(self.request_s, transport.close)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
