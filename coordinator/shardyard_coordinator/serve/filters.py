"""Filters and orders of lists: `FIELD OP VALUE` joined by AND, a subset of AIP-160. No text becomes SQL."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NoReturn

from shardyard.v1 import job_pb2
from shardyard_coordinator.control.spec_walk import tasks
from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import MAX_FILTERED_KEY, Condition
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.serve.validation.text import show

FIELDS: Final = (
    "state",
    "task",
    "queue",
    "priority",
    "creator",
    "display_name",
    "external_uri",
    "create_time",
    "end_time",
)
ORDERS: Final = ("create_time", "end_time", "display_name", "priority")
MAX_CONDITIONS: Final = 32
_TEXT_FIELDS: Final = ("task", "queue", "creator", "display_name", "external_uri")
_MAPS: Final = ("labels.", "annotations.")
_TERM: Final = re.compile(
    r"\s*(?P<field>[A-Za-z_][A-Za-z_.]*(?:(?<=labels\.|ations\.)(?:`[^`]{1,256}`|[^\s=!<>:\"']{1,256}))?)"
    r"\s*(?P<op>!=|<=|>=|=|<|>|:)\s*"
    r"(?:\"(?P<quoted>(?:[^\"\\]|\\.)*)\"|(?P<bare>[^\s\"']+))"
)
_AND: Final = re.compile(r"\s+AND(?=\s)")


def parse_filter(text: str) -> list[Condition]:
    """Parses the conditions. Raises Refused FILTER_INVALID with the column of the error."""
    conditions: list[Condition] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        if conditions:
            joined = _AND.match(text, at)
            if joined is None:
                _refuse(text, at, "conditions are joined by AND")
            at = joined.end()
        term = _TERM.match(text, at)
        if term is None:
            _refuse(text, at, 'a condition is FIELD OP VALUE, such as state = RUNNING or display_name : "two words"')
        quoted = term["quoted"]
        value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else term["bare"]
        conditions += _conditions(text, term.start("field"), term["field"], term["op"], value)
        at = term.end()
        if len(conditions) > MAX_CONDITIONS:
            _refuse(text, at, f"at most {MAX_CONDITIONS} conditions are allowed")
    return conditions


def _conditions(text: str, at: int, field: str, op: str, value: str) -> list[Condition]:
    if field.startswith(_MAPS) and not field.endswith("."):
        owner, _, key = field.partition(".")
        # A key with spaces or operators is written in backticks.
        key = key[1:-1] if len(key) > 2 and key[0] == key[-1] == "`" else key
        if len(key) > MAX_FILTERED_KEY:
            _refuse(text, at, f"filters find keys of at most {MAX_FILTERED_KEY} characters")
        return [Condition(f"{owner}.{key}", op, value)]
    if field not in FIELDS:
        known = ", ".join((*FIELDS, "labels.KEY", "annotations.KEY"))
        _refuse(text, at, f"there is no field {show(field)}; use one of {known}")
    if field == "task" and op in ("=", "!=") and value not in tasks():
        _refuse(text, at, f"{show(value)} is not a task; use one of {', '.join(tasks())}")
    if field in _TEXT_FIELDS:
        return [Condition(field, op, value.removeprefix("queues/") if field == "queue" else value)]
    if op == ":":
        _refuse(text, at, f"`:` is for texts and labels; for {field} use = != < <= > >=")
    if field == "state":
        return [Condition(field, _equality(text, at, field, op), _state(text, at, value))]
    if field == "priority":
        return [Condition(field, op, _priority(text, at, value))]
    conditions = [Condition(field, op, _time_us(text, at, value))]
    if field == "end_time" and op not in (">", ">=", "="):
        conditions.append(Condition(field, ">", 0))  # A job that has not ended has no end time to compare.
    return conditions


def _equality(text: str, at: int, field: str, op: str) -> str:
    if op not in ("=", "!="):
        _refuse(text, at, f"{field} has no order; use = or !=")
    return op


def _state(text: str, at: int, value: str) -> str:
    name = value.upper().removeprefix("STATE_")
    if name not in JobState.__members__:
        _refuse(text, at, f"there is no state {show(value)}; use one of {', '.join(JobState)}")
    return name


def _priority(text: str, at: int, value: str) -> int:
    names = job_pb2.Priority.keys()
    name = "PRIORITY_" + value.upper().removeprefix("PRIORITY_")
    if name not in names or name == "PRIORITY_UNSPECIFIED":
        known = ", ".join(each.removeprefix("PRIORITY_").lower() for each in names[1:])
        _refuse(text, at, f"there is no priority {show(value)}; use one of {known}")
    return int(job_pb2.Priority.Value(name))


def _time_us(text: str, at: int, value: str) -> int:
    try:
        time = datetime.fromisoformat(value)
        time = time if time.tzinfo else time.replace(tzinfo=UTC)
        return int(time.timestamp() * 1_000_000)
    except (ValueError, OverflowError):
        _refuse(text, at, f"{show(value)} is not a time; write it as 2026-01-31T12:00:00Z")


def _refuse(text: str, at: int, rule: str) -> NoReturn:
    while at < len(text) and text[at] == " ":
        at += 1
    message = f"{show(text)} at column {at + 1}: {rule}"
    metadata = {"column": str(at + 1)}
    raise refused_fields([FieldViolation("filter", message, Reason.FILTER_INVALID, metadata)])


def parse_order(text: str) -> tuple[str, bool]:
    """The field to order by, and whether the largest comes first."""
    words = text.split()
    if not words:
        return "create_time", True
    if words[0] not in ORDERS or len(words) > 2 or (len(words) == 2 and words[1] not in ("desc", "asc")):
        rule = f"{show(text)} is not an order; use one of {', '.join(ORDERS)}, followed by ` desc` or nothing"
        raise refused_fields([FieldViolation("order_by", rule)])
    return words[0], words[1:] == ["desc"]
