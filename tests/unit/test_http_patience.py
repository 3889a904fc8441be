"""A connection without a request is ended in time; one whose request is answered slowly is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn

from shardyard_coordinator.web.patience import PatientProtocol

REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
SLOW_S = 1.0


class Hurried(PatientProtocol):
    """With less patience than an answer takes."""

    request_s = 0.4


async def slow(_scope: object, _receive: object, send: object) -> None:
    """Answers late."""
    await asyncio.sleep(SLOW_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]


@contextlib.asynccontextmanager
async def connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(slow, http=Hurried, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server._serve([listener]))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


@pytest.mark.parametrize("said", [b"", b"GET / HT", REQUEST[:-2]], ids=["nothing", "half a line", "no end"])
async def test_a_connection_without_a_request_is_ended(said: bytes) -> None:
    async with connection() as (reader, writer):
        writer.write(said)
        async with asyncio.timeout(30):
            assert await reader.read() == b""


async def test_a_request_that_trickles_is_ended() -> None:
    async with connection() as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for byte in REQUEST[:-1] * 3:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)
                if reader.at_eof():
                    break
        assert reader.at_eof()


async def test_slow_answers_are_waited_for_again_and_again() -> None:
    async with connection() as (reader, writer):
        for _ in range(2):
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and await reader.readexactly(2) == b"ok"
        async with asyncio.timeout(30):
            assert await reader.read() == b"", "a third one did not come"
