"""A real service that answers JSON over HTTP, and how tests ask it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from helpers.repository import ROOT
from helpers.served import BIN, Served, served

JSON = {"content-type": "application/json"}


class Answer(NamedTuple):
    """What HTTP gave back."""

    status: int
    body: Any

    @property
    def reason(self) -> str:
        """The service's own reason."""
        (found,) = [each["debug"]["reason"] for each in self.body["details"] if each["type"] == "google.rpc.ErrorInfo"]
        return str(found)


class Web:
    """The gateway of a service."""

    def __init__(self, service: Served, address: str) -> None:
        self.service = service
        self.address = address

    def ask(
        self, path: str, body: object = None, *, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Answer:
        """One request, as any HTTP client sends it."""
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        url = f"http://{self.address}{path}"
        request = urllib.request.Request(url, data if method == "POST" else None, headers or JSON, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.loads(error.read()))

    def call(self, method: str, body: object = None) -> Any:
        """The answer to a method that succeeds."""
        answer = self.ask(f"/shardyard.v1.{method}", body)
        assert answer.status == 200, answer
        return answer.body

    def stream(self, method: str, *messages: object) -> list[Any]:
        """The messages of a stream, by Connect's own client."""
        command = [BIN / "buf", "curl", "--protocol", "connect", "--schema", ROOT / "protos", "-d", "@-"]
        done = subprocess.run(
            [*command, f"http://{self.address}/shardyard.v1.{method}"],
            input="\n".join(map(json.dumps, messages)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
        while text:
            value, end = decoder.raw_decode(text)
            found.append(value)
            text = text[end:].lstrip()
        return found

    def process(self) -> psutil.Process:
        """Its process."""
        assert self.service.process is not None
        children = psutil.Process(self.service.process.pid).children()
        return next(each for each in children if "shardyard_coordinator.web.gateway" in each.cmdline())


@contextlib.contextmanager
def answering(folder: Path, *options: str) -> Iterator[Web]:
    """A service with a gateway on a free port."""
    with served(folder, "local", "--http", "127.0.0.1:0", *options) as service:
        found = None
        while not (
            found := re.search(r"JSON over HTTP on https?://(\S+);", (service.folder / "serve.log").read_text())
        ):
            assert service.process is not None and service.process.poll() is None
            time.sleep(0.05)
        yield Web(service, found[1])
