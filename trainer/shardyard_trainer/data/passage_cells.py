"""Cells with passages, in data for reranking and for sentence embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardyard_trainer.data.records import Role

MOST_NEGATIVES = 32


def _numbered(number: int) -> Role:
    begins = ("negative", "neg_", "neg", "hard_negative_", "hard_negative")
    return Role(f"negative_{number}", tuple(f"{begin}{number}" for begin in begins), is_optional=number > 1)


NUMBERED_NEGATIVES = tuple(_numbered(number) for number in range(1, MOST_NEGATIVES + 1))
"""Columns that are found by their names alone."""

OTHER_NEGATIVES = tuple(
    replace(
        _numbered(number),
        is_optional=True,
        refusal=f"negatives are numbered from 1 to {MOST_NEGATIVES}; rename the columns",
    )
    for number in (0, MOST_NEGATIVES + 1)
)
"""Columns beside these whose number is one too low or too high: they would be left out unnoticed."""

RECORD_TEXTS = ("passage_text", "text", "contents")
"""Where the text of a record is: those of MS MARCO, and of what was made like it."""


def text_in(value: Any) -> Any:
    """The text of a record that is known to have one; any other value itself."""
    if isinstance(value, Mapping):
        return next((value[key] for key in RECORD_TEXTS if key in value), value)
    return value
