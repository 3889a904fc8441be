"""Results as plain data, the form that `--json` prints."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardyard.types import Event


def to_plain(value: Any) -> Any:
    """Dataclasses, times and durations as JSON knows them: ISO 8601, seconds; it has no NaN and no infinity: null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def event_to_plain(event: Event) -> dict[str, Any]:
    """An event with its payload under the name of its kind."""
    plain: dict[str, Any] = to_plain(event)
    plain[event.kind] = plain.pop("data")
    return plain
