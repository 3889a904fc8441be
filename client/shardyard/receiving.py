"""The other end of a webhook: whether a request is from the service, and what it says. Needs no connection."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping

from google.protobuf import json_format

from shardyard._convert import read_project_event
from shardyard.errors import InvalidArgument, Unauthenticated
from shardyard.types import ProjectEvent
from shardyard.v1 import webhook_service_pb2

_PREFIX = "whsec_"


def read_webhook(
    secret: str, headers: Mapping[str, str], body: bytes, *, tolerance_s: float = 300.0
) -> ProjectEvent | None:
    """The event of a request to a webhook; None if it is a test.

    `body` are the bytes as they came. The same event may come again: `event.id` stays the same.
    Raises: Unauthenticated if the signature is not one of this secret, or the request was signed more than
    `tolerance_s` seconds ago; InvalidArgument if the body is not one of Shardyard.
    """
    given = {name.lower(): value for name, value in headers.items()}
    event_id, seconds = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    signed = b".".join((event_id.encode(), seconds.encode(), body))
    expected = base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256))
    found = [each.partition(",") for each in given.get("webhook-signature", "").split(" ")]
    good = [hmac.compare_digest(value.encode(), expected) for version, _, value in found if version == "v1"]
    if not any(good):
        raise Unauthenticated("the request is not signed with this webhook's secret", reason="SIGNATURE_INVALID")
    if not seconds.isdecimal() or abs(time.time() - int(seconds)) > tolerance_s:
        text = f"the request was signed at {seconds}, more than {tolerance_s:g} s from now; check this machine's clock"
        raise Unauthenticated(text, reason="SIGNATURE_TOO_OLD")
    payload = webhook_service_pb2.WebhookPayload()
    try:
        json_format.Parse(body, payload, ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise InvalidArgument(f"the body is not an event: {error}", reason="PAYLOAD_INVALID") from None
    return read_project_event(payload.data) if payload.HasField("data") else None


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument("the secret is not base64 after `whsec_`", reason="SECRET_INVALID") from None
