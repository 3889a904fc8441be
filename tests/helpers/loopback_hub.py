"""A Hub of one model on the loopback interface: as much of its HTTP as a download asks for."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "me/bert"


class LoopbackHub(http.server.ThreadingHTTPServer):
    """Serves the files of a folder as `me/bert`, at one commit; counts what it is asked."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests = 0
        self.needs_token = ""
        """The token without which its model is private; empty: it is public."""
        self.tokens: set[str] = set()
        """What it was sent as tokens."""
        self.said_bytes: dict[str, int] = {}
        """Sizes that it says of files, other than their own."""

    def says(self, file: Path) -> int:
        """The size of a file, as its listings have it."""
        return self.said_bytes.get(file.name, file.stat().st_size)

    @property
    def endpoint(self) -> str:
        """What `HF_ENDPOINT` is set to."""
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def loopback_hub(folder: Path) -> Iterator[LoopbackHub]:
    """A Hub that is gone at the end."""
    with LoopbackHub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LoopbackHub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests += 1
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.tokens.add(token)
        if self.server.needs_token and token != self.server.needs_token:
            said = {"X-Error-Message": "Invalid credentials in Authorization header"} if token else {}
            self._send(401, token.encode(), said or {"X-Error-Code": "RepoNotFound"}, with_body)
            return
        files = sorted(self.server.folder.iterdir())
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
                return
            names = [{"rfilename": file.name, "size": self.server.says(file)} for file in files]
            body = json.dumps({"id": MODEL, "sha": COMMIT, "siblings": names}).encode()
            self._send(200, body, {"Content-Type": "application/json"}, with_body)
        elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
            listed = [
                {"type": "file", "path": file.name, "size": self.server.says(file), "oid": _digest(file)}
                for file in files
            ]
            self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, with_body)
        elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            file = self.server.folder / path.rsplit("/", 1)[1]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(file)}"'}
            self._send(200, file.read_bytes(), headers, with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing: pytest shows what the test says."""


def _digest(file: Path) -> str:
    # As the Hub names files that are kept in git itself.
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
