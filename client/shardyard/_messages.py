"""Builds messages from callers' values: a value that a field cannot hold is refused with its name, value and rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from shardyard._convert import is_repeated
from shardyard._text import is_utf8, not_utf8, shown
from shardyard.errors import Violation, invalid, invalid_fields

M = TypeVar("M", bound=Message)

INT_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def build(kind: type[M], where: str = "", /, **values: Any) -> M:
    """`kind(**values)`; fields are named below `where`.

    Raises: InvalidArgument with every field that cannot hold its value.
    """
    try:
        return _made(kind, values)
    except (TypeError, ValueError):  # protobuf does not say which field it is.
        prefix = f"{where}." if where else ""
        wrong = [
            Violation(f"{prefix}{name}", _complaint(kind.DESCRIPTOR.fields_by_name[name], value))
            for name, value in values.items()
            if name in kind.DESCRIPTOR.fields_by_name and not _holds(kind, name, value)
        ]
        if not wrong:
            raise
        raise invalid_fields(wrong) from None


def build_duration(field: str, seconds: float) -> Duration:
    """A number of seconds as a message.

    Raises: InvalidArgument if it is not a number, or too large.
    """
    made = Duration()
    try:
        made.FromMilliseconds(round(seconds * 1000))
    except (TypeError, ValueError, OverflowError):
        rule = "a number of seconds is wanted, at most 10,000 years"
        raise invalid(field, f"{shown(seconds)} is given, but {rule}") from None
    return made


def _holds(kind: type[Message], name: str, value: Any) -> bool:
    try:
        _made(kind, {name: value})
    except (TypeError, ValueError):
        return False
    return True


def _made(kind: type[M], values: Mapping[str, Any]) -> M:
    for name, value in values.items():
        field = kind.DESCRIPTOR.fields_by_name.get(name)
        # protobuf would take a text for a list of its characters.
        if isinstance(value, str) and field is not None and is_repeated(field):
            raise TypeError(name)
    return kind(**values)


def _complaint(field: FieldDescriptor, value: Any) -> str:
    texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    for text in texts:
        if isinstance(text, str) and not is_utf8(text):
            return not_utf8(text)
    wanted = _wanted(field)
    return f"{shown(value)} is given, but {f'a list, each {wanted},' if is_repeated(field) else wanted} is needed"


def _wanted(field: FieldDescriptor) -> str:
    if field.cpp_type in INT_RANGES:
        least, most = INT_RANGES[field.cpp_type]
        return f"a whole number from {least} to {most}"
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return "a number"
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    return "text" if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else "another value"
