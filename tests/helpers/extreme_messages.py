"""Messages with values at the ends of what their types can hold, beyond what any clock, counter or terminal has."""

from __future__ import annotations

import random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

M = TypeVar("M", bound=Message)

_F = FieldDescriptor
INT32 = (0, 1, -1, 2**31 - 1, -(2**31), 99)
INT64 = (0, 1, -1, 2**63 - 1, -(2**63), 2**53, 253_402_300_800, -62_135_596_801)
VALUES: dict[int, tuple[Any, ...]] = {
    _F.CPPTYPE_INT32: INT32,
    _F.CPPTYPE_INT64: INT64,
    _F.CPPTYPE_UINT32: (0, 1, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 1, 2**64 - 1),
    _F.CPPTYPE_DOUBLE: (0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1.8e308 / 10, -1e300, 5e-324),
    _F.CPPTYPE_FLOAT: (0.0, float("nan"), float("inf"), float("-inf"), 3.4e38),
    _F.CPPTYPE_BOOL: (False, True),
    _F.CPPTYPE_ENUM: INT32,
    _F.CPPTYPE_STRING: (
        "",
        "\x00",
        "\x1b[2J\x07",
        "a\r\nb",
        "\u202e \U0001d11e \ud7ff",
        "x" * 5000,
        "%s {} {0} \\",
        "[/red] [b]",
    ),
}
BYTES = (b"", b"\xff\x00", b"x" * 100)


def extreme(kind: type[M], rng: random.Random, depth: int = 0) -> M:
    """A message of the type with about every field set to some extreme."""
    message = kind()
    if isinstance(message, Timestamp | Duration):
        message.seconds, message.nanos = rng.choice(INT64), rng.choice(INT32)
    elif isinstance(message, Struct):
        message.update({"a": float("nan"), "b": {"c": [float("inf"), -(2.0**60), None, "\x00"]}})
    else:
        chosen = {oneof.name: rng.choice(oneof.fields) for oneof in message.DESCRIPTOR.oneofs}
        for field in message.DESCRIPTOR.fields:
            oneof = field.containing_oneof
            if rng.random() < 0.85 and (oneof is None or field is chosen[oneof.name]):
                _fill(message, field, rng, depth)
    return message


def _fill(message: Any, field: Any, rng: random.Random, depth: int) -> None:
    owner = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        if value.message_type is None:
            for _ in range(2):
                owner[_scalar(key, rng)] = _scalar(value, rng)
    elif field.is_repeated:
        for _ in range(rng.choice((1, 3)) if depth < 3 else 0):
            if field.message_type is not None:
                owner.add().CopyFrom(extreme(type(owner.add()), rng, depth + 1))
            else:
                owner.append(_scalar(field, rng))
    elif field.message_type is not None:
        if depth < 6:
            owner.CopyFrom(extreme(type(owner), rng, depth + 1))
    else:
        setattr(message, field.name, _scalar(field, rng))


def _scalar(field: Any, rng: random.Random) -> Any:
    if field.type == _F.TYPE_BYTES:
        return rng.choice(BYTES)
    return rng.choice(VALUES[field.cpp_type])
