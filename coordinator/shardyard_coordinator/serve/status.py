"""Encodes an error for the wire: a google.rpc.Status with one ErrorInfo, and BadRequest, RetryInfo.

Status details travel in trailers. So does the message, with three bytes for each byte that is not ASCII. From 8 KiB of
metadata on, clients see RESOURCE_EXHAUSTED at random instead of the error, so all details of one error stay under
6 KiB: what does not fit is counted in `violations_total`.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.serve.scrub import scrub
from shardyard_coordinator.serve.validation.text import code_point, is_control

DOMAIN: Final = "shardyard.dev"
DETAILS_KEY: Final = "grpc-status-details-bin"
MAX_DETAILS_BYTES: Final = 6 * 1024
MAX_MESSAGE_BYTES: Final = 480
MAX_METADATA_BYTES: Final = 200


def encode(refused: Refused) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Code, message and trailing metadata of a refusal."""
    message = cut(refused.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(refused.code.value), message=message)
    metadata = {key[:64]: cut(value, MAX_METADATA_BYTES) for key, value in list(refused.metadata.items())[:16]}
    if refused.violations:
        metadata["violations_total"] = str(len(refused.violations))
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=refused.reason.value, domain=DOMAIN, metadata=metadata)
    )
    if refused.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(refused.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if refused.violations:
        _add_violations(status, refused)
    return grpc.StatusCode[refused.code.value], message, ((DETAILS_KEY, status.SerializeToString()),)


def _add_violations(status: status_pb2.Status, refused: Refused) -> None:
    """The first violations in field order, as many as fit."""
    room = MAX_DETAILS_BYTES - status.ByteSize() - 128
    bad = error_details_pb2.BadRequest()
    for violation in refused.violations:
        entry = error_details_pb2.BadRequest.FieldViolation(
            field=cut(violation.field, MAX_METADATA_BYTES),
            description=cut(violation.message, MAX_MESSAGE_BYTES),
            reason=violation.reason.value,
        )
        size = entry.ByteSize() + 3
        if size > room:
            break
        room -= size
        bad.field_violations.append(entry)
    status.details.add().Pack(bad)


def cut(text: str, limit: int) -> str:
    """The text without terminal controls and this machine's details; its beginning with `…` if it is over the limit.

    `limit` is in bytes.
    """
    text = scrub(text[: 8 * limit])
    if not text.isprintable():
        text = "".join(code_point(each) if is_control(each) and each != "\n" else each for each in text)
    data = text.encode("utf-8", "replace")
    return text if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"
