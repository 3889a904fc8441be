"""Rules of every field of every message: no U+0000, and valid durations and timestamps."""

from __future__ import annotations

import math
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shardyard_coordinator.domain.errors import FieldViolation

_DURATION: Final = "google.protobuf.Duration"
_TIMESTAMP: Final = "google.protobuf.Timestamp"
_VALUE: Final = "google.protobuf.Value"
_MAX_DURATION_S: Final = 315_576_000_000
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799


def violations(message: Message, path: str = "") -> list[FieldViolation]:
    """All violations below the message. Counts must have been checked before."""
    found: list[FieldViolation] = []
    _walk(message, path, found)
    return found


def _walk(message: Message, path: str, found: list[FieldViolation]) -> None:
    name = message.DESCRIPTOR.full_name
    if name in (_DURATION, _TIMESTAMP):
        if complaint := _time_complaint(message, name):
            found.append(FieldViolation(path.rstrip("."), complaint))
        return
    if name == _VALUE and message.WhichOneof("kind") is None:
        found.append(FieldViolation(path.rstrip("."), "has no value; give one, or leave the key out"))
        return
    for field, value in message.ListFields():
        here = path + field.name
        if field.type == FieldDescriptor.TYPE_STRING:
            _check_strings(field, value, here, found)
        elif field.type == FieldDescriptor.TYPE_DOUBLE and name == _VALUE:
            if not math.isfinite(value):
                found.append(FieldViolation(path.rstrip("."), f"`{value}` is not finite; give an ordinary number"))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            _check_messages(field, value, here, found)


def _check_strings(field: FieldDescriptor, value: Any, path: str, found: list[FieldViolation]) -> None:
    items = [(path, value)] if not field.is_repeated else [(f"{path}[{at}]", each) for at, each in enumerate(value)]
    for where, each in items:
        if "\0" in each:
            text = f"`{each.replace(chr(0), 'U+0000')[:80]}` has the control character U+0000; leave it out"
            found.append(FieldViolation(where, text))


def _check_messages(field: FieldDescriptor, value: Any, path: str, found: list[FieldViolation]) -> None:
    if not field.is_repeated:
        _walk(value, f"{path}.", found)
        return
    if field.message_type.GetOptions().map_entry:
        for key, each in value.items():
            where = f'{path}["{key[:64]}"]' if isinstance(key, str) else f"{path}[{key}]"
            if isinstance(key, str) and "\0" in key:
                found.append(FieldViolation(where.replace("\0", "U+0000"), "the key has U+0000; leave it out"))
            if isinstance(each, Message):
                _walk(each, f"{where}.", found)
            elif isinstance(each, str) and "\0" in each:
                found.append(FieldViolation(where, "the value has U+0000; leave it out"))
        return
    for at, each in enumerate(value):
        _walk(each, f"{path}[{at}].", found)


def _time_complaint(message: Any, name: str) -> str | None:
    seconds, nanos = message.seconds, message.nanos
    shown = f"`{seconds} s {nanos} ns`"
    if name == _TIMESTAMP:
        if not _FIRST_S <= seconds <= _LAST_S or not 0 <= nanos < 10**9:
            return f"{shown} is not a time of the years 1 to 9999; give one"
        return None
    if abs(nanos) >= 10**9 or seconds * nanos < 0:
        return f"{shown} is not a duration: nanos must be under a second and of the sign of seconds; correct it"
    if abs(seconds) > _MAX_DURATION_S:
        return f"{shown} is over 10,000 years; give a shorter duration"
    return None
