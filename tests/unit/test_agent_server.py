"""The Ray agent's end of the link: every request is answered, whatever becomes of it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from shardyard_coordinator.launch.agent_server import Unavailable, serve
from shardyard_coordinator.launch.frames import Header, frame, pack, read_frame, unpack
from shardyard_coordinator.launch.protocols import NodeGone


class OfRay(Exception):
    """Stands for Ray's own errors."""


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (LookupError("no such attempt"), "lookup", "no such attempt"),
        (TimeoutError(), "timeout", "no answer in time"),
        (Unavailable("no node"), "unavailable", "no node"),
        (NodeGone("node 1 is gone"), "node", "node 1 is gone"),
        (OfRay("lost\nits trace"), "ray", "lost"),
        (ValueError("whatever"), "internal", "the Ray agent failed, see its log: ValueError"),
    ],
)
async def test_every_request_is_answered_whatever_its_method_raises(raised: Exception, kind: str, text: str) -> None:
    async def fail(header: Header, body: bytes) -> bytes:
        raise raised

    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(serve(theirs, {"hello": True}, {"fail": fail}, of_ray=OfRay))
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    writer.write(frame(pack({"id": 7, "method": "fail"})))
    async with asyncio.timeout(5):
        hello, answer = [unpack(await read_frame(reader) or b"")[0] for _ in range(2)]
        writer.close()
        await serving
    assert (hello, answer) == ({"hello": True}, {"id": 7, "error": kind, "text": text})
