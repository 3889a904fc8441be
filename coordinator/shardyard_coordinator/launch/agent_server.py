"""The agent's end of `agent_link`: answers requests, each in its own task.

Requests are {"id", "method", ...} and a body; answers are {"id"} and a body, or {"id", "error": kind, "text"}.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

from shardyard_coordinator.launch.frames import Header, frame, pack, read_frame, unpack
from shardyard_coordinator.launch.protocols import NodeGone, StorageFailed

Methods = Mapping[str, Callable[[Header, bytes], Awaitable[bytes]]]

_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """The target of a request is missing, or does not answer; the text says what is known about it."""


async def serve(channel: socket.socket, hello: Header, methods: Methods, *, of_ray: type[Exception]) -> None:
    """Sends a greeting, then answers until the other end is gone. `of_ray` are Ray's own errors."""
    reader, writer = await asyncio.open_unix_connection(sock=channel)
    writer.write(frame(pack(hello)))
    tasks: set[asyncio.Task[None]] = set()
    while (request := await read_frame(reader)) is not None:
        task = asyncio.create_task(_answer(request, writer, methods, of_ray))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _answer(request: bytes, writer: asyncio.StreamWriter, methods: Methods, of_ray: type[Exception]) -> None:
    header, body = unpack(request)
    reply: Header = {"id": header["id"]}
    result = b""
    try:
        result = await methods[header["method"]](header, body)
    except LookupError as error:
        reply |= {"error": "lookup", "text": str(error)}
    except TimeoutError as error:
        reply |= {"error": "timeout", "text": str(error) or "no answer in time"}
    except Unavailable as error:
        reply |= {"error": "unavailable", "text": str(error)}
    except NodeGone as error:
        reply |= {"error": "node", "text": str(error)}
    except StorageFailed as error:
        reply |= {"error": error.cause.value, "text": str(error)}
    except of_ray as error:
        _log.warning("%s: %s", header["method"], error)
        reply |= {"error": "ray", "text": str(error).partition("\n")[0]}
    except Exception as error:  # edge: without an answer, the caller would wait until its timeout.
        _log.exception("%s", header["method"])
        reply |= {"error": "internal", "text": f"the Ray agent failed, see its log: {type(error).__name__}"}
    writer.write(frame(pack(reply, result)))
    with contextlib.suppress(ConnectionError):
        await writer.drain()
