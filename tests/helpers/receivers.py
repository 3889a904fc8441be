"""A real HTTP server that receives webhooks, and answers as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """The header `webhook-id`."""
        return self.headers["webhook-id"]

    @property
    def payload(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


Answer = int | tuple[int, dict[str, str], bytes]


@dataclass
class Listening:
    """What was received, and what is answered: `answer` gets each request; `hold_s` passes before."""

    port: int = 0
    answer: Callable[[Received], Answer] = lambda _: 204
    hold_s: float = 0.0
    received: list[Received] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}/hook?from=shardyard"

    @property
    def accepted(self) -> list[str]:
        """The ids that were answered with 2xx, each once, in the order of their first time."""
        return list(dict.fromkeys(self._accepted))

    _accepted: list[str] = field(default_factory=list)


@contextmanager
def receiver(*, port: int = 0) -> Iterator[Listening]:
    """Listens on the loopback interface until the end."""
    state = Listening()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            state.connections += 1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            state.received.append(request)
            time.sleep(state.hold_s)
            answer = state.answer(request)
            status, headers, content = (answer, {}, b"") if isinstance(answer, int) else answer
            if 200 <= status < 300:
                state._accepted.append(request.id)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("content-length", str(len(content)))
            self.end_headers()
            if status != 204:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
