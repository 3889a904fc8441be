"""Counts of repeated fields, checked by `len` before anything walks over them.

A message of 400 kB can hold 200,000 items; validating each of them would hold the loop for seconds. The limits are the
`max_items` and `max_pairs` rules of the protos, read from the descriptors: the generated code keeps them as unknown
options, for no package ships `buf.validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import empty_pb2, unknown_fields  # type: ignore[attr-defined]
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from shardyard_coordinator.domain.errors import FieldViolation

_FIELD_RULES: Final = 1159
_REPEATED, _MAX_ITEMS = 18, 2
_MAP, _MAX_PAIRS = 19, 2
DEFAULT_MAX_ITEMS: Final = 4096
"""For repeated fields without a rule of their own: those of messages that are not ours, such as Struct."""


@dataclass(frozen=True)
class _Field:
    name: str
    limit: int | None
    child: Any
    repeated: bool


class Counts:
    """Checks messages against the limits of their descriptors, which it caches."""

    def __init__(self) -> None:
        self._fields: dict[str, tuple[_Field, ...]] = {}

    def violations(self, message: Message) -> list[FieldViolation]:
        """The repeated fields with too many items."""
        found: list[FieldViolation] = []
        self._check(message, "", found)
        return found

    def _check(self, message: Message, path: str, found: list[FieldViolation]) -> None:
        for field in self._of(message.DESCRIPTOR):
            if field.limit is not None:
                value = getattr(message, field.name)
                if len(value) > field.limit:
                    found.append(_too_many(path + field.name, len(value), field.limit))
                elif field.child is not None and self._of(field.child):
                    self._check_items(value, path + field.name, found)
            elif message.HasField(field.name):
                self._check(getattr(message, field.name), f"{path}{field.name}.", found)

    def _check_items(self, items: Any, path: str, found: list[FieldViolation]) -> None:
        if isinstance(items, Mapping):
            for key in items:
                self._check(items[key], f"{path}[{key!r:.40}].", found)
            return
        for index, item in enumerate(items):
            self._check(item, f"{path}[{index}].", found)

    def _of(self, descriptor: Any) -> tuple[_Field, ...]:
        """The fields that are repeated, or lead to repeated fields."""
        known = self._fields.get(descriptor.full_name)
        if known is None:
            self._fields[descriptor.full_name] = ()  # Ends the recursion of recursive messages; corrected below.
            known = tuple(_read(field) for field in descriptor.fields if _leads_to_repeated(field, frozenset()))
            self._fields[descriptor.full_name] = known
        return known


def _read(field: FieldDescriptor) -> _Field:
    child = field.message_type
    if not field.is_repeated:
        return _Field(field.name, None, child, repeated=False)
    if child is not None and child.GetOptions().map_entry:
        child = child.fields_by_name["value"].message_type
    return _Field(field.name, max_items(field), child, repeated=True)


def _leads_to_repeated(field: FieldDescriptor, seen: frozenset[str]) -> bool:
    if field.is_repeated:
        return True
    child = field.message_type
    if child is None or child.full_name in seen:
        return False
    return any(_leads_to_repeated(each, seen | {child.full_name}) for each in child.fields)


def max_items(field: FieldDescriptor) -> int:
    """The limit of a repeated field: its own, or the default."""
    own = own_limit(field)
    return DEFAULT_MAX_ITEMS if own is None else own


def own_limit(field: FieldDescriptor) -> int | None:
    """The limit in a repeated field's own rules; None if it has no such rule."""
    for option in unknown_fields.UnknownFieldSet(field.GetOptions()):
        if option.field_number != _FIELD_RULES:
            continue
        for number, key in ((_REPEATED, _MAX_ITEMS), (_MAP, _MAX_PAIRS)):
            rules = _unknown(option.data).get(number)
            limit = _unknown(rules).get(key) if rules is not None else None
            if limit is not None:
                return int(limit)
    return None


def _unknown(data: bytes) -> dict[int, Any]:
    """The fields of an encoded message by number, without knowing its type."""
    return {each.field_number: each.data for each in unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(data))}


def _too_many(field: str, count: int, limit: int) -> FieldViolation:
    return FieldViolation(field, f"{count} items; at most {limit} are allowed; send fewer")
