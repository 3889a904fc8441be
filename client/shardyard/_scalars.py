"""What an unquoted YAML scalar is until the type of its field is known."""

from __future__ import annotations

from typing import Any


class PlainScalar(str):
    """An unquoted YAML scalar: text that may mean a number, a truth value or nothing."""


def is_null(item: Any) -> bool:
    """Whether an unquoted YAML scalar is null."""
    return isinstance(item, PlainScalar) and item in ("", "~", "null", "Null", "NULL")


def is_empty(item: Any) -> bool:
    """Whether nothing was written, in whichever way: fields may be put there."""
    return item is None or item == "" or is_null(item)
