"""What a request passes before it is a call: its path and form, and whether a page in a browser made it.

A page that someone opens can send requests to this machine's own ports. It cannot hide its `Origin`, nor, if its name
was made to mean this machine, the `Host` that it believes in: requests with either are refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import cache
from http import HTTPStatus
from importlib import resources
from typing import Any

from connectrpc.method import StreamType

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_PART_S, _WHOLE_S = 60.0, 120.0
"""The longest wait for the next part of a body, and for all of one that is not a stream."""

_UNARY = ("application/json", "application/proto")
_STREAMED = ("application/connect+json", "application/connect+proto")


class Front:
    """Answers what is not a call, and hands on the rest. `is_local`: only names of this machine are expected."""

    def __init__(
        self, calls: App, endpoints: Mapping[str, Any], *, is_serving: Callable[[], Awaitable[bool]], is_local: bool
    ) -> None:
        self._calls = calls
        self._forms = {
            path: _UNARY if each.method.stream_type is StreamType.UNARY else _STREAMED
            for path, each in endpoints.items()
        }
        self._is_serving = is_serving
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if fault := self._foreign(headers):
            await _refuse(send, HTTPStatus.FORBIDDEN, "permission_denied", fault)
        elif scope["path"] == "/healthz":
            await self._health(send)
        elif scope["path"] == "/openapi.json":
            await _answer(send, HTTPStatus.OK, _openapi())
        elif scope["path"] not in self._forms:
            text = f"there is no {_shown(scope['path'])}; /openapi.json describes all calls"
            await _refuse(send, HTTPStatus.NOT_FOUND, "unimplemented", text)
        elif scope["method"] != "POST":
            text = f"{_shown(scope['method'])} is not a way to call a method; use POST"
            await _refuse(send, HTTPStatus.METHOD_NOT_ALLOWED, "unimplemented", text, allow="POST")
        elif (form := headers.get(b"content-type", "").partition(";")[0].strip().lower()) not in (
            forms := self._forms[scope["path"]]
        ):
            step = f"this method takes {' or '.join(forms)}"
            if forms is _STREAMED:
                step += ", which clients of Connect send; it streams"
            text = f"the content-type {_shown(form)} is not one of these: {step}"
            await _refuse(send, HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "invalid_argument", text)
        else:
            await self._calls(scope, _in_time(receive, is_stream=self._forms[scope["path"]] is _STREAMED), send)

    def _foreign(self, headers: Mapping[bytes, str]) -> str:
        """Why a request is not answered, by where it comes from; empty: nothing speaks against it."""
        if b"origin" in headers:
            return f"a page of {_shown(headers[b'origin'])} sent this; pages in browsers are not answered"
        host = headers.get(b"host", "")  # Browsers always send one.
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._is_local and host and name.lower() not in _LOCAL_NAMES:
            return f"the host {_shown(host)} is not a name of this machine; use 127.0.0.1 or localhost"
        return ""

    async def _health(self, send: Send) -> None:
        if await self._is_serving():
            await _answer(send, HTTPStatus.OK, b'{"status":"SERVING"}')
        else:
            await _answer(send, HTTPStatus.SERVICE_UNAVAILABLE, b'{"status":"NOT_SERVING"}')


def _in_time(receive: Receive, *, is_stream: bool) -> Receive:
    """Ends a request whose body does not come in time."""
    loop, whole = asyncio.get_running_loop(), False
    until_s = loop.time() + _WHOLE_S

    async def take() -> MutableMapping[str, Any]:
        nonlocal whole
        if whole:  # From now on only the client's end is waited for.
            return await receive()
        try:
            next_s = loop.time() + _PART_S
            async with asyncio.timeout_at(next_s if is_stream else min(next_s, until_s)):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = not message.get("more_body", False)
        return message

    return take


@cache
def _openapi() -> bytes:
    return resources.files("shardyard.v1").joinpath("openapi.json").read_bytes()


def _shown(text: str) -> str:
    return f"`{text[:100]}`" if text.isprintable() else ascii(text[:100])


async def _refuse(send: Send, status: HTTPStatus, code: str, message: str, **headers: str) -> None:
    body = json.dumps({"code": code, "message": message}, ensure_ascii=False).encode()
    await _answer(send, status, body, **headers)


async def _answer(send: Send, status: HTTPStatus, body: bytes, **headers: str) -> None:
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    found = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *named]
    await send({"type": "http.response.start", "status": int(status), "headers": found})
    await send({"type": "http.response.body", "body": body})
