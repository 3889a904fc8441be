"""Counts the fields of an encoded message in its bytes, before it is parsed.

A few bytes on the wire become an object in memory, and a step of every walk over the message: 130 kB can hold 60,000
values in lists. So the guard counts first, in well under a microsecond a field, and stops at its limit. The parser
refuses bytes that are not a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _LENGTH, _GROUP, _END_GROUP, _FIXED32 = range(6)
_MOST_VARINT = 10

Shape = Mapping[int, Any]
"""By field number: the Shape of a message field, or None for a text. Other fields have no entry."""


class Weight(NamedTuple):
    """Fields and items at all levels, and the bytes of texts among them."""

    nodes: int
    text_bytes: int


class TooManyNodes(Exception):
    """The message has more nodes than the limit; `numbers` are the fields on the way to the node that reached it."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(numbers)
        self.numbers = numbers


def shape_of(descriptor: Descriptor, known: dict[str, dict[int, Any]] | None = None) -> Shape:
    """The shape of a message type; recursive if the type is."""
    known = {} if known is None else known
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    shape = known.setdefault(descriptor.full_name, {})
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            shape[field.number] = shape_of(field.message_type, known)
        elif field.type == FieldDescriptor.TYPE_STRING:
            shape[field.number] = None
    return shape


def weigh(data: bytes, shape: Shape, most: int) -> Weight:
    """Counts the fields and items of an encoded message; of a broken one, those before the break.

    Raises: TooManyNodes as soon as there are more than `most`.
    """
    try:
        return _weigh(data, shape, most)
    except IndexError:
        return Weight(0, 0)  # Cut off inside a number: the parser refuses it before anything walks over it.


def _weigh(data: bytes, fields: Shape, most: int) -> Weight:
    """One loop without recursion: the stack holds the fields and ends of the messages around."""
    at, end, nodes, text_bytes = 0, len(data), 0, 0
    stack: list[tuple[Shape, int, int]] = []
    while True:
        if at >= end:
            if not stack:
                return Weight(nodes, text_bytes)
            fields, end, _ = stack.pop()
            continue
        tag = data[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(data, at - 1)
        nodes += 1
        if nodes > most:
            raise TooManyNodes([number for _, _, number in stack] + [tag >> 3])
        kind = tag & 7
        if kind == _LENGTH:
            length = data[at]
            at += 1
            if length >= 0x80:
                length, at = _varint(data, at - 1)
            if length > end - at:
                return Weight(nodes, text_bytes)
            child = fields.get(tag >> 3, _OPAQUE)
            if child is None:
                text_bytes += length
            elif child is not _OPAQUE:
                stack.append((fields, end, tag >> 3))
                fields, end = child, at + length
                continue
            at += length
        elif kind == _VARINT:
            if data[at] < 0x80:
                at += 1
            else:
                _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _GROUP:  # Not one of our messages: the parser keeps its content as bytes.
            stack.append((fields, end, tag >> 3))
            fields = _NOTHING
        elif kind == _END_GROUP and stack:
            fields, end, _ = stack.pop()
        else:
            return Weight(nodes, text_bytes)


_OPAQUE = object()
_NOTHING: Shape = {}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the position after it. Raises: IndexError if it does not end."""
    value = 0
    for shift in range(0, 7 * _MOST_VARINT, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a number of over 10 bytes")


def path_of(descriptor: Any, numbers: list[int]) -> str:
    """The names of the fields on the way, as far as the type knows them, such as `job.spec.model`."""
    names: list[str] = []
    for number in numbers:
        field = descriptor.fields_by_number.get(number)
        if field is None:
            break
        if not descriptor.GetOptions().map_entry:
            names.append(field.name)
        if field.message_type is None:
            break
        descriptor = field.message_type
    return ".".join(names[:8])
