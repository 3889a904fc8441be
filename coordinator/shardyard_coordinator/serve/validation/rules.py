"""The rules of the protos, checked by protovalidate and reported in words: value, rule, next step."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

import protovalidate
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.serve.validation.text import show

_BOUNDS: Final = re.compile(r"must be (.+)")


def violations(message: Message) -> list[FieldViolation]:
    """Every broken rule of the message, one a field."""
    found: dict[str, FieldViolation] = {}
    for violation in protovalidate.collect_violations(message):
        path = _path(violation.proto.field)
        rule = violation.proto.rule_id
        if path in found and rule.rsplit(".", 1)[-1] != "finite":
            continue  # NaN breaks every bound; the message of `finite` is the clearest.
        found[path] = FieldViolation(path, _words(message, violation))
    return list(found.values())


def _path(path: Any) -> str:
    text = ""
    for element in path.elements:
        text += ("." if text else "") + element.field_name
        if element.subscript is not None:
            value = element.subscript.value
            text += f"[{value}]" if element.subscript.field == "index" else f'["{value:.64}"]'
    return text


def _words(message: Message, violation: Any) -> str:
    rule_id, text = violation.proto.rule_id, violation.proto.message
    value, limit = violation.field_value, violation.rule_value
    match rule_id.rsplit(".", 1)[-1]:
        case "required":
            return _missing(message, violation.proto.field)
        case "finite":
            return f"{show(value)} is not finite; give an ordinary number"
        case "defined_only":
            return f"unknown value {value}; use one of {', '.join(_enum_values(message, violation.proto.field))}"
        case "max_len" | "min_len" if isinstance(value, str):
            return f"{show(value)} has {len(value)} characters; the text {text}; {_shorter(rule_id)}"
        case "max_bytes":
            return f"{show(value)} has {len(value.encode())} bytes; at most {limit} are allowed; shorten it"
        case "min_items":
            return f"{len(value)} items; at least {limit} must be given; add some"
        case "unique":
            doubled = next(each for each, times in Counter(value).items() if times > 1)
            return f"duplicate value {show(doubled)}; leave one out"
        case "pattern":
            return f"{show(value)} does not match `{limit}`; correct it"
    bounds = _BOUNDS.fullmatch(text)
    rule = bounds[1] if bounds else text
    return f"{show(value)} is not allowed: {text}; give a value {rule}{_or_unset(message, violation.proto.field)}"


def _shorter(rule_id: str) -> str:
    return "shorten it" if rule_id.endswith("max_len") else "fill it in"


def _missing(message: Message, path: Any) -> str:
    owner, name = _owner(message, path)
    oneof = owner.DESCRIPTOR.oneofs_by_name.get(name)
    if oneof is not None:
        return f"is missing; set one of {', '.join(field.name for field in oneof.fields)}"
    return "is missing; it is required; add it"


def _or_unset(message: Message, path: Any) -> str:
    owner, name = _owner(message, path)
    field = owner.DESCRIPTOR.fields_by_name.get(name)
    optional = field is not None and not field.is_repeated and field.has_presence
    return ", or leave it out for the default" if optional and not field.containing_oneof.fields[1:] else ""


def _enum_values(message: Message, path: Any) -> list[str]:
    owner, name = _owner(message, path)
    enum: EnumDescriptor = owner.DESCRIPTOR.fields_by_name[name].enum_type
    return [each.name for each in enum.values if each.number != 0]


def _owner(message: Message, path: Any) -> tuple[Message, str]:
    """The message that holds the last element of a path, and that element's name."""
    *above, last = path.elements
    for element in above:
        value = getattr(message, element.field_name)
        message = value if element.subscript is None else value[element.subscript.value]
    return message, last.field_name
