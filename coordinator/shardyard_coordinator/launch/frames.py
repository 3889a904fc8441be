"""Frames on a stream between two processes: 4 bytes of big-endian length, then the payload.

A rank's reports use bare frames. The agent and the compute workers put a JSON header and a body into each payload:
4 bytes of header length, the header, the body. Several byte strings fit into one body with `join`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterable
from typing import Any

MAX_FRAME_BYTES = 256 * 1024 * 1024

_LENGTH = struct.Struct(">I")

Header = dict[str, Any]


class FrameError(ValueError):
    """The stream is not made of frames, or one is over the limit."""


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next payload; None at the end of the stream, a torn last frame included."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive_frame(channel: socket.socket) -> bytes | None:
    """As `read_frame`, on a blocking socket. Raises: FrameError."""
    head = _receive(channel, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
    return _receive(channel, length)


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return _LENGTH.pack(len(payload)) + payload


def pack(header: Header, body: bytes = b"") -> bytes:
    """A payload of a JSON header and a body."""
    head = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTH.pack(len(head)) + head + body


def unpack(payload: bytes) -> tuple[Header, bytes]:
    """Header and body of a payload made by `pack`."""
    (length,) = _LENGTH.unpack_from(payload)
    end = _LENGTH.size + length
    return json.loads(payload[_LENGTH.size : end]), payload[end:]


def join(parts: Iterable[bytes]) -> bytes:
    """Joins byte strings into one for `split`."""
    return b"".join(frame(part) for part in parts)


def split(joined: bytes) -> list[bytes]:
    """The byte strings that `join` has joined."""
    parts = []
    at = 0
    while at < len(joined):
        (length,) = _LENGTH.unpack_from(joined, at)
        at += _LENGTH.size
        parts.append(joined[at : at + length])
        at += length
    return parts


def _receive(channel: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        part = channel.recv(min(length - len(data), 1024 * 1024))
        if not part:
            return None
        data += part
    return bytes(data)
