"""Keeps all values readable for every client: bounds gangs' reports when they arrive, and rows when they are sent.

A time outside 1970 to 9998, a negative duration and one over ten years become unset; whole numbers are between 0 and
2**53; a number that is not finite is removed, unless it is a loss or a metric; texts have no NUL and a maximal length.
So one odd report never keeps a client from reading the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

_log = logging.getLogger(__name__)
_Message = TypeVar("_Message", bound=Message)

MAX_COUNT: Final = 1 << 53
# A day less than the maximum of a datetime, so that it is valid in every time zone.
MAX_TIME_US: Final = 253_370_764_800_000_000 - 1
MAX_DURATION_S: Final = 10 * 365 * 86_400
MAX_ENTRIES: Final = 1000
MAX_TEXT: Final = 4096
# Longer limits for messages and the ends of logs.
_MAX_TEXTS: Final[Mapping[str, int]] = {"message": 16_384, "next_step": 16_384, "log_tail": 65_536}
_MAY_BE_ODD: Final = frozenset({"loss", "grad_norm", "value", "metrics"})
_INT32: Final = (1 << 31) - 1


def bound(message: Message) -> None:
    """Brings every value of a message into bounds, in place, at any depth."""
    plan = _plan(message.DESCRIPTOR)
    for field, value in message.ListFields():
        check = plan[field.number]
        if check is not None:
            check(message, field.name, value)


def parsed(kind: type[_Message], data: bytes, *, as_sent: bool = False) -> _Message:
    """A message of a row, in bounds; an empty one if its bytes cannot be read.

    `as_sent`: a client's own message, which was checked on arrival and is returned unchanged.
    """
    message = kind()
    read_into(message, data, as_sent=as_sent)
    return message


def read_into(message: Message, data: bytes, *, as_sent: bool = False) -> None:
    """The same into a field of another message, which is set afterwards."""
    message.SetInParent()
    try:
        message.ParseFromString(data)
    except DecodeError:
        _log.warning("a %s of the store cannot be read; it is shown as empty", message.DESCRIPTOR.full_name)
        message.Clear()
        message.SetInParent()
        return
    if not as_sent:
        bound(message)


def count(value: int) -> int:
    """A number of steps, tokens or bytes."""
    return min(max(value, 0), MAX_COUNT)


def small_count(value: int) -> int:
    """The same if the message has only 32 bits for it."""
    return min(max(value, -1), _INT32)


def time_us(time: Timestamp) -> int:
    """Microseconds since 1970; 0 for an invalid time."""
    in_range = 0 <= time.seconds <= MAX_TIME_US // 1_000_000 and 0 <= time.nanos < 1_000_000_000
    return time.seconds * 1_000_000 + time.nanos // 1000 if in_range else 0


def text(value: str, limit: int = MAX_TEXT) -> str:
    """A text without NUL, which PostgreSQL and terminals do not take, cut at its limit."""
    clean = value.replace("\0", "\ufffd") if "\0" in value else value
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


_Check = Callable[[Message, str, Any], None]


@lru_cache(maxsize=256)
def _plan(descriptor: Descriptor) -> Mapping[int, _Check | None]:
    return {field.number: _check_of(field) for field in descriptor.fields}


def _check_of(field: FieldDescriptor) -> _Check | None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _bound_map
    if field.message_type is not None:
        return _bound_each if field.is_repeated else _bound_one
    if field.is_repeated:
        return _bound_texts if field.type == FieldDescriptor.TYPE_STRING else None
    if field.type == FieldDescriptor.TYPE_STRING:
        return _bound_text
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return None if field.name in _MAY_BE_ODD else _bound_number
    return _bound_count if field.type == FieldDescriptor.TYPE_INT64 else None


def _bound_one(owner: Message, name: str, value: Any) -> None:
    if isinstance(value, Timestamp):
        if value.ByteSize() and not time_us(value):
            owner.ClearField(name)
    elif isinstance(value, Duration):
        in_range = 0 <= value.seconds <= MAX_DURATION_S and 0 <= value.nanos < 1_000_000_000
        if not in_range:
            owner.ClearField(name)
    else:
        bound(value)


def _bound_each(_owner: Message, _name: str, values: Any) -> None:
    for value in values:
        bound(value)


def _bound_map(_owner: Message, name: str, entries: Any) -> None:
    # Checkpoints are chosen by the loss, so it is never dropped.
    for key in sorted(entries, key=lambda each: (each != "loss", len(each), each))[MAX_ENTRIES:]:
        del entries[key]
    for key, value in list(entries.items()):
        kept = value
        if isinstance(value, str):
            kept = text(value)
        elif isinstance(value, Message):
            bound(value)
        if text(key) != key or (isinstance(value, float) and name not in _MAY_BE_ODD and not math.isfinite(value)):
            del entries[key]
        elif kept is not value:
            entries[key] = kept


def _bound_texts(_owner: Message, _name: str, values: Any) -> None:
    for at, value in enumerate(values):
        if len(value) > MAX_TEXT or "\0" in value:
            values[at] = text(value)


def _bound_text(owner: Message, name: str, value: str) -> None:
    limit = _MAX_TEXTS.get(name, MAX_TEXT)
    if len(value) > limit or "\0" in value:
        setattr(owner, name, text(value[-limit:] if name == "log_tail" else value, limit))


def _bound_number(owner: Message, name: str, value: float) -> None:
    if not math.isfinite(value):
        owner.ClearField(name)


def _bound_count(owner: Message, name: str, value: int) -> None:
    if not 0 <= value <= MAX_COUNT:
        setattr(owner, name, count(value))
