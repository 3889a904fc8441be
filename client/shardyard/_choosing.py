"""Builds the question which model to train, without a connection: shared by both clients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration

from shardyard._messages import build, build_duration
from shardyard._parse import duration_s
from shardyard._text import shown
from shardyard.errors import invalid
from shardyard.v1 import choosing_pb2

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class ChoosingFields(TypedDict, total=False):
    """What is known of the data, and what a model must meet."""

    languages: Sequence[str]
    rows: int
    tokens_per_row: int
    memory: int | str
    max_latency: timedelta | float | str
    max_time: timedelta | float | str
    max_cost: float
    licences: Sequence[str]
    commercial_use: bool
    max_results: int


_NAMES = tuple(ChoosingFields.__annotations__)


def recommend_request(parent: str, task: str, fields: ChoosingFields) -> choosing_pb2.RecommendModelsRequest:
    """The request, from values as users give them: `memory` such as `4GiB`, times such as `90s` or `2h`.

    Raises: InvalidArgument.
    """
    values: dict[str, Any] = dict(fields)
    for name in ("max_latency", "max_time"):
        if values.get(name) is not None:
            values[name] = _duration(name, values[name])
    if (memory := values.pop("memory", None)) is not None:
        values["memory_bytes"] = size_bytes("memory", memory)
    unknown = values.keys() - choosing_pb2.RecommendModelsRequest.DESCRIPTOR.fields_by_name.keys()
    if unknown:
        raise TypeError(f"recommend_models takes no {', '.join(sorted(unknown))}; it takes {', '.join(_NAMES)}")
    given = {name: value for name, value in values.items() if value is not None}
    return build(choosing_pb2.RecommendModelsRequest, parent=parent, task=task, **given)


def size_bytes(field: str, value: int | str) -> int:
    """Bytes of `4GiB`, `512 MiB`, `16GB`, or a number of bytes.

    Raises: InvalidArgument.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    unit = _UNITS.get(found[2]) if found is not None else None
    if found is None or unit is None:
        raise invalid(field, f"{shown(value)} is not a size; write `4GiB`, `512MiB`, `16GB`, or a number of bytes")
    return round(float(found[1]) * unit)


def _duration(field: str, value: Any) -> Duration:
    seconds = duration_s(value)
    if seconds is None:
        raise invalid(field, f"{shown(value)} is not a duration; write `90s`, `30m`, `2h` or `1h30m`")
    return build_duration(field, seconds)
