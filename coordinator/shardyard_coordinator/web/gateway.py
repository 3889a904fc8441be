"""The process that answers HTTP: `python -m ...web.gateway --listen HOST:PORT --service SOCKET --fd N`.

It is a process of its own, so that reading JSON holds up no other client of the service. On the socket N it hears the
secret by which it calls the service, and says one line of JSON, {"port"} or {"error"}; it ends in good order when the
other end of the socket is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from connectrpc.server import ConnectASGIApplication

from shardyard_coordinator.serve.certificates import TlsUnusable
from shardyard_coordinator.serve.protection import TlsFiles
from shardyard_coordinator.web.bodies import PassThrough
from shardyard_coordinator.web.callers import KnownProtocol
from shardyard_coordinator.web.calls import Calls
from shardyard_coordinator.web.front import Front
from shardyard_coordinator.web.tls import server_context

MAX_BODY_BYTES = 6 * 1024 * 1024
"""A message of 4 MiB has 5.4 MB as JSON if it is all bytes."""

_MAX_HEADER_BYTES = 32 * 1024
_MAX_REQUESTS = 2_000
_IDLE_S = 30
_DRAIN_S = 5


class _Application(ConnectASGIApplication[Mapping[str, Any]]):
    """All services on one port."""

    @property
    def path(self) -> str:
        """They are mounted at the root."""
        return "/"


def main() -> int:
    """Serves until its socket is closed; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--tls", nargs="+", type=Path, default=())
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    control = socket.socket(fileno=arguments.fd)
    with control.makefile("r") as said:
        secret = said.readline().strip()
    host, _, port = arguments.listen.rpartition(":")
    host = host.strip("[]")
    try:
        tls = server_context(TlsFiles(*arguments.tls)) if arguments.tls else None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family, backlog=512)
    except (OSError, TlsUnusable) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        control.sendall(json.dumps({"error": why}).encode() + b"\n")
        return 1
    with listener:
        calls = partial(Calls, arguments.service, secret)
        asyncio.run(_serve(listener, calls, control, tls=tls, is_local=arguments.local))
    return 0


async def _serve(
    listener: socket.socket,
    make_calls: Callable[[], Calls],
    control: socket.socket,
    *,
    tls: ssl.SSLContext | None,
    is_local: bool,
) -> None:
    calls = make_calls()
    endpoints = calls.endpoints()
    application = _Application(
        service=endpoints,
        endpoints=lambda found: found,
        read_max_bytes=MAX_BODY_BYTES,
        codecs=[PassThrough("json"), PassThrough("proto")],
    )
    front = Front(application, endpoints, is_serving=calls.is_serving, is_local=is_local)
    server = uvicorn.Server(
        uvicorn.Config(
            front,
            http=KnownProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_REQUESTS,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_DRAIN_S,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
    )

    def end() -> None:
        asyncio.get_running_loop().remove_reader(control)
        server.should_exit = True

    control.setblocking(False)
    asyncio.get_running_loop().add_reader(control, end)
    control.send(json.dumps({"port": listener.getsockname()[1]}).encode() + b"\n")
    try:
        await server.serve(sockets=[listener])
    finally:
        await calls.close()


if __name__ == "__main__":
    sys.exit(main())
