"""The admin port: `/metrics` for Prometheus, `/healthz` and `/readyz` for probes. It takes no commands.

A few lines of HTTP of our own, on the service's event loop: the server of prometheus-client starts a thread for each
connection, as many as a stranger opens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

_log = logging.getLogger(__name__)
MAX_CONNECTIONS = 32
MAX_REQUEST_BYTES = 8192
PATIENCE_S = 5.0
# A connection that is closed before its request was read is reset, and its peer never sees why.
_REFUSAL_S = 0.2
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TEXT_TYPE = "text/plain; charset=utf-8"
_WORDS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


class AdminServer:
    """Answers GET and HEAD of three paths, each connection once."""

    def __init__(self, exposition: Callable[[], Awaitable[bytes]], is_serving: Callable[[], bool]) -> None:
        """`exposition` makes the metrics' text; `is_serving` says whether calls are served."""
        self._exposition = exposition
        self._is_serving = is_serving
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, host: str, port: int) -> int:
        """Binds and returns the port. Raises: OSError, with the next step, if the address is taken or not its own."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_REQUEST_BYTES)
        except OSError as error:
            text = (
                f"cannot listen on {host}:{port} for metrics: the port is taken, or the address is not this machine's; "
                "choose another one with --admin-listen"
            )
            raise OSError(text) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stops listening; open connections end by themselves within seconds."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            is_full = self._open > MAX_CONNECTIONS
            async with asyncio.timeout(_REFUSAL_S if is_full else PATIENCE_S):
                head = await _head(reader)
            method, status, kind, body = await self._answer(head, is_full=is_full)
            lines = (
                f"HTTP/1.1 {status} {_WORDS[status]}",
                f"Content-Type: {kind}",
                f"Content-Length: {len(body)}",
                "X-Content-Type-Options: nosniff",
                "Connection: close",
            )
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else body))
            async with asyncio.timeout(PATIENCE_S):
                await writer.drain()
        except (TimeoutError, ConnectionError):
            writer.transport.abort()  # A peer that neither sends nor reads.
        finally:
            self._open -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, head: bytes, *, is_full: bool) -> tuple[str, int, str, bytes]:
        """Method, status, type and body."""
        if is_full:
            return "", 503, _TEXT_TYPE, b"too many connections\n"
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return "", 400, _TEXT_TYPE, b"not a request\n"
        method, path = words[0].decode("latin-1"), words[1].partition(b"?")[0]
        if method not in ("GET", "HEAD"):
            return method, 405, _TEXT_TYPE, b"only GET and HEAD\n"
        if path == b"/metrics":
            return method, 200, METRICS_TYPE, await self._exposition()
        if path == b"/healthz":
            return method, 200, _TEXT_TYPE, b"ok\n"
        if path == b"/readyz":
            serves = self._is_serving()
            return method, 200 if serves else 503, _TEXT_TYPE, b"ok\n" if serves else b"not serving\n"
        return method, 404, _TEXT_TYPE, b"there are /metrics, /healthz and /readyz\n"


async def _head(reader: asyncio.StreamReader) -> bytes:
    """The request's line and headers; empty if there are none within the bound."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return b""
