"""A warm process that calls functions of the trainer package: `python -m ...compute_worker --warm a,b --fd N`.

Requests and answers are frames on the socket: {"function": "package.module:name"} and a body come in; {"ok": true}
and the answer's bytes, or {"ok": false, "error": traceback} go out. The first frame, {"ready": true}, says that the
modules of `--warm` are imported.
"""

from __future__ import annotations

import argparse
import importlib
import socket
import traceback
from collections.abc import Callable
from typing import cast

from shardyard_coordinator.launch.frames import Header, frame, pack, receive_frame, unpack


def main() -> None:
    """Imports, says so, then answers until the socket is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--warm", default="")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    channel = socket.socket(fileno=arguments.fd)
    for module in filter(None, arguments.warm.split(",")):
        importlib.import_module(module)
    channel.sendall(frame(pack({"ready": True})))
    while (request := receive_frame(channel)) is not None:
        channel.sendall(frame(answer(request)))


def answer(request: bytes) -> bytes:
    """Calls what a request asks for."""
    header, body = unpack(request)
    reply: Header = {"ok": True}
    result = b""
    try:
        result = resolve(header["function"])(body)
    except Exception:  # The edge: whatever the function raises is the caller's to know, and this process goes on.
        reply = {"ok": False, "error": traceback.format_exc()}
    return pack(reply, result)


def resolve(function: str) -> Callable[[bytes], bytes]:
    """The function that `package.module:name` names."""
    module, _, name = function.partition(":")
    return cast(Callable[[bytes], bytes], getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    main()
