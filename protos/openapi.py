"""Describes the calls over HTTP in OpenAPI 3.1, from the protos with their comments: `describe(descriptor set)`.

The forms are those of proto JSON: names in camelCase, 64-bit whole numbers and durations as strings, bytes in base64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto

PACKAGE = "shardyard.v1"
_REF = "#/components/schemas/"
_FIELD = FieldDescriptorProto

_SCALARS: dict[int, dict[str, Any]] = {
    _FIELD.TYPE_INT32: {"type": "integer", "format": "int32"},
    _FIELD.TYPE_INT64: {"type": "string", "format": "int64"},
    _FIELD.TYPE_UINT32: {"type": "integer", "minimum": 0},
    _FIELD.TYPE_UINT64: {"type": "string", "format": "uint64"},
    _FIELD.TYPE_DOUBLE: {"type": "number"},
    _FIELD.TYPE_FLOAT: {"type": "number"},
    _FIELD.TYPE_BOOL: {"type": "boolean"},
    _FIELD.TYPE_STRING: {"type": "string"},
    _FIELD.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}

_KNOWN: dict[str, dict[str, Any]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?\d+(\.\d{1,9})?s$", "examples": ["90s"]},
    "google.protobuf.FieldMask": {"type": "string", "examples": ["displayName,labels"]},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
    "google.protobuf.Empty": {"type": "object", "additionalProperties": False},
}

_ERROR = {
    "type": "object",
    "description": "Why a call failed. `details` has google.rpc.ErrorInfo with the reason (docs/errors.md), and "
    "google.rpc.BadRequest with each broken rule.",
    "required": ["code"],
    "properties": {
        "code": {"type": "string", "description": "The gRPC code in lower case, such as `invalid_argument`."},
        "message": {"type": "string"},
        "details": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"type": "string", "description": "Such as `google.rpc.ErrorInfo`."},
                    "value": {"type": "string", "contentEncoding": "base64"},
                    "debug": {"type": "object", "description": "The detail as JSON."},
                },
            },
        },
    },
}


def describe(data: bytes) -> str:
    """The description as JSON, from a descriptor set with its source info."""
    files = [each for each in descriptor_pb2.FileDescriptorSet.FromString(data).file if each.package == PACKAGE]
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    tags = []
    for file in files:
        notes = _Notes(file)
        for at, message in enumerate(file.message_type):
            schemas.update(_messages(message, PACKAGE, notes, (4, at)))
        for at, enum in enumerate(file.enum_type):
            schemas[f"{PACKAGE}.{enum.name}"] = _enum(enum, notes, (5, at))
        for at, service in enumerate(file.service):
            tags.append({"name": service.name, "description": notes.of((6, at))})
            for place, method in enumerate(service.method):
                paths[f"/{PACKAGE}.{service.name}/{method.name}"] = {
                    "post": _operation(service.name, method, notes.of((6, at, 2, place)))
                }
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Shardyard",
                "version": "v1",
                "description": "Every call of the gRPC services as JSON over HTTP, by the Connect protocol.",
            },
            "tags": tags,
            "paths": dict(sorted(paths.items())),
            "components": {"schemas": dict(sorted(schemas.items()))},
        },
        indent=1,
        ensure_ascii=False,
    )


class _Notes:
    """The comments of a file, by the places of what they are about."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._notes = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}

    def of(self, place: Sequence[int]) -> str:
        """The comment, on one line."""
        return " ".join(self._notes.get(tuple(place), "").split())


def _messages(
    message: DescriptorProto, scope: str, notes: _Notes, place: tuple[int, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A message and those inside it."""
    name = f"{scope}.{message.name}"
    entries = {f".{name}.{each.name}": each for each in message.nested_type if each.options.map_entry}
    properties = {
        field.json_name: {**_field(field, entries), **_text(notes.of((*place, 2, at)))}
        for at, field in enumerate(message.field)
    }
    text = " ".join(filter(None, (notes.of(place), *_choices(message))))
    yield name, {"type": "object", "properties": properties, "additionalProperties": False, **_text(text)}
    for at, inner in enumerate(message.nested_type):
        if not inner.options.map_entry:
            yield from _messages(inner, name, notes, (*place, 3, at))
    for at, enum in enumerate(message.enum_type):
        yield f"{name}.{enum.name}", _enum(enum, notes, (*place, 4, at))


def _choices(message: DescriptorProto) -> Iterator[str]:
    """Which fields exclude one another."""
    for at, oneof in enumerate(message.oneof_decl):
        names = [each.json_name for each in message.field if each.HasField("oneof_index") and each.oneof_index == at]
        if not oneof.name.startswith("_") and len(names) > 1:
            yield f"At most one of {', '.join(f'`{name}`' for name in names)}."


def _field(field: FieldDescriptorProto, entries: dict[str, DescriptorProto]) -> dict[str, Any]:
    if field.type_name in entries:
        return {"type": "object", "additionalProperties": _one(entries[field.type_name].field[1])}
    one = _one(field)
    return {"type": "array", "items": one} if field.label == _FIELD.LABEL_REPEATED else one


def _one(field: FieldDescriptorProto) -> dict[str, Any]:
    if field.type not in (_FIELD.TYPE_MESSAGE, _FIELD.TYPE_ENUM):
        return dict(_SCALARS[field.type])
    name = field.type_name.removeprefix(".")
    return dict(_KNOWN[name]) if name in _KNOWN else {"$ref": _REF + name}


def _enum(enum: EnumDescriptorProto, notes: _Notes, place: tuple[int, ...]) -> dict[str, Any]:
    lines = [f"`{each.name}`: {notes.of((*place, 2, at))}" for at, each in enumerate(enum.value)]
    return {"type": "string", "enum": [each.name for each in enum.value], **_text(" ".join((notes.of(place), *lines)))}


def _operation(service: str, method: descriptor_pb2.MethodDescriptorProto, text: str) -> dict[str, Any]:
    streams = method.client_streaming or method.server_streaming
    form = "application/connect+json" if streams else "application/json"
    if streams:
        text += " A stream: for clients of Connect, or by gRPC."

    def body(name: str) -> dict[str, Any]:
        return {form: {"schema": _KNOWN.get(name.removeprefix("."), {"$ref": _REF + name.removeprefix(".")})}}

    return {
        "operationId": f"{service}_{method.name}",
        "tags": [service],
        "description": text,
        "requestBody": {"required": True, "content": body(method.input_type)},
        "responses": {
            "200": {"description": "The answer.", "content": body(method.output_type)},
            "default": {
                "description": "The call failed.",
                "content": {"application/json": {"schema": {"$ref": f"{_REF}Error"}}},
            },
        },
    }


def _text(text: str) -> dict[str, str]:
    return {"description": text} if text else {}
