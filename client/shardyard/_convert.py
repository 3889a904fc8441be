"""Protobuf at the door: messages become frozen dataclasses, or plain data in the form of a spec file."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from shardyard import types as results

T = TypeVar("T")

# What google.protobuf.Duration can hold.
MAX_DURATION_S = 315_576_000_000
_MOST_NANOS = 999_999_999
# From the second day of the year 1 to the last but one of 9999: a time zone may move them by a day.
_CALENDAR_S = (-62_135_510_400, 253_402_214_399)
# Our field names and the contract's: `from` is a keyword; a continuation is text like any other.
_RENAMED = {"from_state": "from", "text": "generated_text"}


def read(kind: type[T], message: Message) -> T:
    """The message as the dataclass `kind`, whose field names and types say how."""
    return kind(**_values(kind, message))


def read_event(message: Any) -> results.Event:
    """A JobEvent; a payload that this client does not know is of kind `unknown`."""
    which = message.WhichOneof("payload")
    payload = getattr(message, which) if which else None
    return results.Event(
        sequence=message.sequence,
        id=message.id,
        time=_time(message.time) if message.HasField("time") else None,
        attempt=message.attempt,
        kind=which or "unknown",
        data=None if payload is None else read(getattr(results, payload.DESCRIPTOR.name), payload),
    )


def read_project_event(message: Any) -> results.ProjectEvent:
    """A ProjectEvent."""
    return results.ProjectEvent(message.cursor, message.job, message.job_uid, read_event(message.event))


def read_prediction(message: Any) -> results.Prediction:
    """A Prediction, flat: the fields of the output that is set, beside its own; an output with a name here is one."""
    which = message.WhichOneof("output")
    output = getattr(message, which) if which else None
    is_whole = which in results.Prediction.__dataclass_fields__
    inner = _values(results.Prediction, output) if isinstance(output, Message) and not is_whole else {}
    return results.Prediction(**{**_values(results.Prediction, message), **inner})


def read_explanation(message: Any) -> results.Explanation:
    """An Explanation, with its prediction as `predict` returns it."""
    values = _values(results.Explanation, message)
    return results.Explanation(**{**values, "prediction": read_prediction(message.prediction)})


def to_plain(message: Message) -> dict[str, Any]:
    """The message as plain data: snake_case, short enums, durations like `90s`, ISO 8601 times; unset is left out."""
    plain: dict[str, Any] = {}
    for field, value in message.ListFields():
        if is_map(field):
            plain[field.name] = {str(key): _plain_value(_map_value(field), item) for key, item in sorted(value.items())}
        elif is_repeated(field):
            plain[field.name] = [_plain_value(field, item) for item in value]
        else:
            plain[field.name] = _plain_value(field, value)
    return plain


def short_enum(descriptor: EnumDescriptor, number: int) -> str:
    """`mean` for POOLING_MEAN; the number itself if this client does not know it."""
    value = descriptor.values_by_number.get(number)
    return str(number) if value is None else value.name.removeprefix(enum_prefix(descriptor)).lower()


@functools.cache
def enum_prefix(descriptor: EnumDescriptor) -> str:
    """`POOLING_` of the enum Pooling: what all names begin with, from the zero value."""
    return str(descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED"))


def duration_text(value: Duration) -> str:
    """`90s`, `1.5s`: as proto JSON writes it; a value out of range becomes the nearest valid one."""
    return str(_legal_duration(value).ToJsonString())


@functools.cache
def _shared(kind: Any, descriptor: Descriptor) -> tuple[tuple[str, FieldDescriptor, Any], ...]:
    """The fields of a dataclass that a message has, each with the message's field and its own type."""
    fields, hints = descriptor.fields_by_name, typing.get_type_hints(kind)
    names = [(name, name if name in fields else _RENAMED.get(name, "")) for name in hints]
    return tuple((ours, fields[theirs], hints[ours]) for ours, theirs in names if theirs in fields)


def _values(kind: Any, message: Message) -> dict[str, Any]:
    """The values of those fields of a dataclass that the message has."""
    return {name: _field_value(message, field, hint) for name, field, hint in _shared(kind, message.DESCRIPTOR)}


def _field_value(message: Message, field: FieldDescriptor, hint: Any) -> Any:
    value = getattr(message, field.name)
    if is_map(field):
        return dict(value)
    if is_repeated(field):
        return _list_value(field, value, hint)
    if field.has_presence and not message.HasField(field.name):
        return None
    if value == "" and not field.has_presence and _without_none(hint) is not hint:
        return None  # In such a field an empty text means that there is none.
    return _single(field, value, hint)


def _list_value(field: FieldDescriptor, values: Any, hint: Any) -> Any:
    if field.message_type is None and field.enum_type is None:
        return tuple(values)  # Vectors are long.
    if typing.get_origin(hint) is Mapping:  # Pairs in an order of theirs.
        key, value = (part.name for part in field.message_type.fields)
        return {getattr(pair, key): getattr(pair, value) for pair in values}
    item = typing.get_args(hint)[0]
    if typing.get_origin(item) is tuple:  # A list of lists is one of messages with a single field.
        (only,) = field.message_type.fields
        return tuple(_field_value(each, only, item) for each in values)
    return tuple(_single(field, value, item) for value in values)


def _single(field: FieldDescriptor, value: Any, hint: Any) -> Any:
    if field.enum_type is not None:
        return short_enum(field.enum_type, value)
    if field.message_type is None:
        return value
    if isinstance(value, Timestamp):
        return _time(value)
    if isinstance(value, Duration):
        return _span(value)
    inner = _without_none(hint)
    if not dataclasses.is_dataclass(inner):
        return to_plain(value)
    nested: Any = inner
    return read(nested, value)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def _time(value: Timestamp) -> datetime:
    """The moment; one that no calendar of Python has becomes the nearest that can be shown in every time zone."""
    return _legal_time(value).ToDatetime(tzinfo=UTC)


def _span(value: Duration) -> timedelta:
    """The duration; one beyond what a timedelta can hold becomes the longest there is."""
    if abs(value.seconds) >= timedelta.max.days * 86_400:
        return timedelta.max if value.seconds > 0 else timedelta.min
    return timedelta(seconds=value.seconds, microseconds=_clamp(value.nanos, -_MOST_NANOS, _MOST_NANOS) // 1000)


def _legal_time(value: Timestamp) -> Timestamp:
    return Timestamp(seconds=_clamp(value.seconds, *_CALENDAR_S), nanos=_clamp(value.nanos, 0, _MOST_NANOS))


def _legal_duration(value: Duration) -> Duration:
    seconds = _clamp(value.seconds, -MAX_DURATION_S, MAX_DURATION_S)
    least, most = (0 if seconds > 0 else -_MOST_NANOS), (0 if seconds < 0 else _MOST_NANOS)
    return Duration(seconds=seconds, nanos=_clamp(value.nanos, least, most))


def _clamp(number: int, least: int, most: int) -> int:
    return max(least, min(number, most))


def _plain_value(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is not None:
        return short_enum(field.enum_type, value)
    if isinstance(value, Struct):
        return {key: _plain_struct(item) for key, item in value.fields.items()}
    if isinstance(value, Duration):
        return duration_text(value)
    if isinstance(value, Timestamp):
        return _legal_time(value).ToJsonString()
    if isinstance(value, Message):
        return to_plain(value)
    if isinstance(value, bytes):
        return value.hex()
    return value


def _plain_struct(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _plain_struct(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain_struct(item) for item in value.list_value.values]
    if kind == "number_value":  # Struct knows doubles only: 10 went in as 10.0.
        return int(value.number_value) if value.number_value.is_integer() else value.number_value
    return None if kind in (None, "null_value") else getattr(value, str(kind))


def is_repeated(field: FieldDescriptor) -> bool:
    """Whether the field holds a list or a map."""
    # `label` is deprecated in the versions that have `is_repeated`, and the only way in those before.
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def is_map(field: FieldDescriptor) -> bool:
    """Whether the field holds a map."""
    kind: Descriptor | None = field.message_type
    return kind is not None and is_repeated(field) and kind.GetOptions().map_entry


def _map_value(field: FieldDescriptor) -> FieldDescriptor:
    found: FieldDescriptor = field.message_type.fields_by_name["value"]
    return found
