"""The process that answers HTTP: `python -m ...web.gateway --listen HOST:PORT --service HOST:PORT --fd N`.

It is a process of its own, so that reading JSON holds up no other client of the service. On the socket N it says one
line of JSON, {"port"} or {"error"}; it ends in good order when the other end of the socket is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import sys
from collections.abc import Mapping
from typing import Any

import uvicorn
from connectrpc.server import ConnectASGIApplication

from shardyard_coordinator.web.bodies import PassThrough
from shardyard_coordinator.web.calls import Calls
from shardyard_coordinator.web.front import Front
from shardyard_coordinator.web.patience import PatientProtocol

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
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    control = socket.socket(fileno=arguments.fd)
    host, _, port = arguments.listen.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family, backlog=512)
    except OSError as error:
        control.sendall(json.dumps({"error": error.strerror or str(error)}).encode() + b"\n")
        return 1
    with listener:
        asyncio.run(_serve(listener, arguments.service, control, is_local=arguments.local))
    return 0


async def _serve(listener: socket.socket, service: str, control: socket.socket, *, is_local: bool) -> None:
    calls = Calls(service)
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
            http=PatientProtocol,
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
