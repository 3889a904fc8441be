"""Where a call comes from: its connection, or for a call through the HTTP door that of the door's client.

The door calls over a socket of its own, which only this account can open, and proves with a secret of this run that it
is the door. So it alone can say whose call it is; metadata of the same name from elsewhere is not read.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Final, Protocol
from urllib.parse import quote

from shardyard_coordinator.serve.bearer import invalid
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.certificates import Holder, holder_of

KEY: Final = "shardyard-door-bin"
_DOOR: Final = "unix:"
_MOST_NAME: Final = 1000


class Context(Protocol):
    """What is read of a call's grpc context."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """The metadata that the caller sent."""

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """What TLS knows of the connection."""


class Origins:
    """Recognises the door's calls. `secret` is for the door alone."""

    def __init__(self) -> None:
        self.secret = secrets.token_urlsafe(32)

    def locate(self, call: Call, context: Context) -> Call:
        """The call with its client's address and the holder of its client's certificate.

        Raises: Refused CREDENTIALS_INVALID for a call on the door's socket that is not the door's.
        """
        if not call.peer.startswith(_DOOR):
            pem = context.auth_context().get("x509_pem_cert")
            return dataclasses.replace(call, holder=holder_of(bytes(pem[0])) if pem else None)
        claimed = _read(dict(context.invocation_metadata()).get(KEY, b""), self.secret)
        if claimed is None:
            raise invalid("this socket is for the HTTP door of the service; call the address of `--listen`")
        peer, holder = claimed
        return dataclasses.replace(call, peer=peer, holder=holder)


def claim(secret: str, peer: str, holder: Holder | None) -> tuple[str, bytes]:
    """The metadata by which the door says whose call it makes."""
    # A longer name is refused in any case, and would not fit into metadata.
    said = None if holder is None else [holder.name[:_MOST_NAME], holder.expire_us]
    return KEY, json.dumps({"secret": secret, "peer": peer, "holder": said}).encode()


def peer_of(host: str, port: int) -> str:
    """The address of a client as gRPC writes it."""
    return f"ipv6:%5B{quote(host, safe=':')}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _read(value: str | bytes, secret: str) -> tuple[str, Holder | None] | None:
    try:
        said = json.loads(value)
        given, peer, holder = said["secret"], said["peer"], said["holder"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), secret.encode()):
        return None
    return peer, None if holder is None else Holder(*holder)
