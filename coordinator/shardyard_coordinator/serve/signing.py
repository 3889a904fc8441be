"""The requests of webhooks, in the form of the Standard Webhooks specification: body, headers and signature."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf import json_format

from shardyard.v1 import event_service_pb2, webhook_service_pb2
from shardyard_coordinator.domain.records import EventKind

SECRET_PREFIX = "whsec_"
_SECRET_BYTES = 32


class Post(NamedTuple):
    """What is sent: the id that stays the same however often it is sent, the type, and the body."""

    id: str
    type: str
    body: bytes


def make_secret() -> bytes:
    """A new key for signatures."""
    return secrets.token_bytes(_SECRET_BYTES)


def shown_secret(secret: bytes) -> str:
    """The key as its owner gets it, once."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def event_post(kind: EventKind, event: event_service_pb2.ProjectEvent) -> Post:
    """The request for an event."""
    payload = webhook_service_pb2.WebhookPayload(type=f"job.{kind.name.lower()}", data=event)
    payload.timestamp.CopyFrom(event.event.time)
    return _post(event.event.id, payload)


def test_post(now_us: int) -> Post:
    """The request of a test."""
    payload = webhook_service_pb2.WebhookPayload(type="webhook.test")
    payload.timestamp.FromMicroseconds(now_us)
    return _post(f"test-{secrets.token_hex(16)}", payload)


def _post(post_id: str, payload: webhook_service_pb2.WebhookPayload) -> Post:
    data = json_format.MessageToDict(payload)
    return Post(post_id, payload.type, json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())


def headers_of(post: Post, keys: Sequence[bytes], now_us: int, *, agent: str) -> dict[str, str]:
    """The headers of one attempt: signed with every key, so that a receiver may know any of them."""
    seconds = str(now_us // 1_000_000)
    return {
        "content-type": "application/json",
        "user-agent": agent,
        "webhook-id": post.id,
        "webhook-timestamp": seconds,
        "webhook-signature": " ".join(signature(key, post.id, seconds, post.body) for key in keys),
    }


def signature(key: bytes, post_id: str, seconds: str, body: bytes) -> str:
    """`v1,` and the HMAC-SHA256 over id, time and body, joined by full stops."""
    signed = b".".join((post_id.encode(), seconds.encode(), body))
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
