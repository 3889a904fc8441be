"""Page tokens and cursors: opaque strings made by this store, for one kind and one request.

`base64url(version byte, HMAC-SHA256 cut to 16 bytes, JSON of the payload)`. The HMAC covers kind, binding and payload:
a token of another list, of another job or with a changed byte is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason

MAX_PAGE_BYTES = 1024 * 1024
_VERSION = b"\x01"
_MAC_BYTES = 16
_Record = TypeVar("_Record")
_Message = TypeVar("_Message", bound=Message)


class Tokens:
    """Makes and reads tokens with the store's key."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, kind: str, binding: str, payload: Any) -> str:
        """A token of the kind, bound to a request or a job."""
        body = json.dumps(payload, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(_VERSION + self._mac(kind, binding, body) + body).rstrip(b"=").decode()

    def read(self, kind: str, binding: str, token: str) -> Any:
        """The payload; ValueError if the token is not one of this kind and binding."""
        try:
            data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError, ValueError):
            raise ValueError("not a token") from None
        mac, body = data[1 : 1 + _MAC_BYTES], data[1 + _MAC_BYTES :]
        if data[:1] != _VERSION or not hmac.compare_digest(mac, self._mac(kind, binding, body)):
            raise ValueError("not a token of this list")
        return json.loads(body)

    def _mac(self, kind: str, binding: str, body: bytes) -> bytes:
        text = b"\0".join((_VERSION, kind.encode(), binding.encode(), body))
        return hmac.digest(self._secret, text, hashlib.sha256)[:_MAC_BYTES]


class Pages:
    """Page tokens of one list method: bound to everything in the request but page_size and page_token."""

    def __init__(self, tokens: Tokens, kind: str, request: Any) -> None:
        self._tokens = tokens
        self._kind = kind
        self._binding = _binding(request)
        self._token: str = request.page_token
        self.size = min(request.page_size or 50, 1000)

    def after(self) -> Any:
        """Where the page begins: the key of the last record of the page before; None: the first page.

        Raises: Refused PAGE_TOKEN_INVALID.
        """
        if not self._token:
            return None
        try:
            return self._tokens.read(self._kind, self._binding, self._token)
        except ValueError:
            text = (
                f"`{self._token[:40]}` is not a page token of this list with this parent, filter, order and view; "
                "start again without one"
            )
            raise refused_fields([FieldViolation("page_token", text, Reason.PAGE_TOKEN_INVALID)]) from None

    def fill(
        self, found: Sequence[_Record], encode: Callable[[_Record], _Message], key: Callable[[_Record], Any]
    ) -> tuple[list[_Message], str]:
        """The page's messages, and the token of the next page, which is empty after the last.

        `found` are the records after the last page's, at most one more than a page. A page ends at its count or at
        1 MiB, whichever is first.
        """
        page: list[_Message] = []
        size = 0
        for record in found[: self.size]:
            message = encode(record)
            size += message.ByteSize()
            if size > MAX_PAGE_BYTES and page:
                break
            page.append(message)
        return page, "" if len(found) == len(page) else self.token(key(found[len(page) - 1]))

    def token(self, key: Any) -> str:
        """The token of the page after this key."""
        return self._tokens.make(self._kind, self._binding, key)


def cursor_invalid(field: str, cursor: str) -> Refused:
    """The error for a cursor that does not belong to this stream, and this job or project."""
    text = f"`{cursor[:40]}` is not a cursor of this stream, and this job or project; start again without one"
    return refused_fields([FieldViolation(field, text, Reason.CURSOR_INVALID)])


def _binding(request: Message) -> str:
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("page_size")
    copy.ClearField("page_token")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()[:32]
