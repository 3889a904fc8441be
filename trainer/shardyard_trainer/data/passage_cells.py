"""Cells with passages, in data for reranking and for sentence embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardyard_trainer.data.records import Role

MOST_NEGATIVES = 32
NUMBERED_NEGATIVES = tuple(
    Role(f"negative_{number}", (f"neg_{number}",), is_optional=number > 1) for number in range(1, MOST_NEGATIVES + 1)
)
"""Columns that are found by their names alone."""

RECORD_TEXTS = ("passage_text", "text", "contents")
"""Where the text of a record is: those of MS MARCO, and of what was made like it."""


def text_in(value: Any) -> Any:
    """The text of a record that is known to have one; any other value itself."""
    if isinstance(value, Mapping):
        return next((value[key] for key in RECORD_TEXTS if key in value), value)
    return value
