"""Errors of the service in Connect's form: the same code, message and details, readable in JSON too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import grpc
from connectrpc.code import Code
from connectrpc.errors import ConnectError, ErrorDetail
from google.protobuf import descriptor_pb2, duration_pb2
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.rpc import error_details_pb2, status_pb2
from protobuf import Message as ReadableMessage
from protobuf.wkt import Any as AnyMessage
from protobuf.wkt.google.protobuf.descriptor_pb import FileDescriptorSet

_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {"CANCELLED": "canceled"}
"""Codes that Connect spells in another way."""


def connect_error(error: grpc.aio.AioRpcError) -> ConnectError:
    """The error of a call, for its HTTP client."""
    name = error.code().name
    code = Code(_CODES.get(name, name.lower()))
    return ConnectError(code, error.details() or "", tuple(_details(error)))


def _details(error: grpc.aio.AioRpcError) -> Iterator[ErrorDetail]:
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            found = AnyMessage(type_url=detail.type_url, value=detail.value)
            # A message instead of an Any is written out for people too, under `debug`.
            yield ErrorDetail(_readable(found) or found)


def _readable(detail: AnyMessage) -> ReadableMessage | None:
    kind = _kinds().message(detail.type_url.rpartition("/")[2])
    return None if kind is None else detail.unpack(kind)


@cache
def _kinds() -> Any:
    """Google's kinds of details, for Connect's own protobuf."""
    files = descriptor_pb2.FileDescriptorSet()
    for file in (duration_pb2.DESCRIPTOR, error_details_pb2.DESCRIPTOR):
        made = files.file.add()
        file.CopyToProto(made)
        _name_in_json(made.message_type, file)
    return FileDescriptorSet.from_binary(files.SerializeToString()).to_registry()


def _name_in_json(made: Any, owner: FileDescriptor | Descriptor) -> None:
    """Adds the names of fields in JSON, which generated code leaves out."""
    found = owner.message_types_by_name if isinstance(owner, FileDescriptor) else owner.nested_types_by_name
    for message in made:
        described = found[message.name]
        for field in message.field:
            field.json_name = described.fields_by_name[field.name].json_name
        _name_in_json(message.nested_type, described)
