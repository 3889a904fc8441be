"""Messages on their way through the gateway: as bytes, in the form that the client uses.

Connect's library decodes and encodes on the event loop; here its codecs only pass bytes through, so that a large body
of JSON is read in a thread of its own, while other calls are answered.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from connectrpc.code import Code
from connectrpc.errors import ConnectError
from google.protobuf import json_format
from google.protobuf.message import Message

_DEEPEST = 64
_AT_ONCE_BYTES = 16 * 1024
_THREADS = 2


class Body(NamedTuple):
    """A message as its client sent it: JSON, or protobuf bytes."""

    data: bytes
    is_json: bool


class PassThrough:
    """A codec of Connect that leaves messages as they are: `json` or `proto`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        """The form, as it is in content types."""
        return self._name

    def encode(self, message: bytes) -> bytes:
        """What `Bodies.to_client` has made."""
        return message

    def decode(self, data: bytes | bytearray, _kind: object) -> Body:
        """For `Bodies.to_service`."""
        return Body(bytes(data), self._name == "json")


class Bodies:
    """Turns bodies of clients into messages of the service, and back."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "bodies")

    async def to_service(self, body: Body, kind: type[Message]) -> bytes:
        """The request as protobuf bytes. Raises: ConnectError invalid_argument for JSON that is not this message."""
        if not body.is_json:
            return body.data
        if len(body.data) <= _AT_ONCE_BYTES:
            return _from_json(body.data, kind)
        return await self._in_thread(_from_json, body.data, kind)

    async def to_client(self, data: bytes, kind: type[Message], *, is_json: bool) -> bytes:
        """An answer in the client's form."""
        if not is_json:
            return data
        if len(data) <= _AT_ONCE_BYTES:
            return _to_json(data, kind)
        return await self._in_thread(_to_json, data, kind)

    async def _in_thread(self, convert: object, data: bytes, kind: type[Message]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, convert, data, kind)  # type: ignore[arg-type]


def _from_json(data: bytes, kind: type[Message]) -> bytes:
    message = kind()
    try:
        if data.strip()[:1] not in {b"{", b""}:
            raise ValueError("it is not an object")
        # An unknown field is refused: dropped, a misspelt one would be as if it had not been given.
        json_format.Parse(data or b"{}", message, max_recursion_depth=_DEEPEST)
        return message.SerializeToString()
    except (json_format.ParseError, UnicodeDecodeError, RecursionError, ValueError) as error:
        what = str(error).strip() or type(error).__name__
        text = f"the body is not a {kind.DESCRIPTOR.full_name} as JSON: {what[:1000]}"
        raise ConnectError(Code.INVALID_ARGUMENT, text) from None


def _to_json(data: bytes, kind: type[Message]) -> bytes:
    return json_format.MessageToJson(kind.FromString(data), indent=None, ensure_ascii=False).encode()
