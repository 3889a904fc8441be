"""Lists in one cell: as lists, or written as text the way JSON, Python or NumPy do, or as words with spaces between."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import numpy as np

from shardyard_trainer.data.errors import shorten

_SPACED_NUMBERS = re.compile(r"[\[(]\s*([+-]?[0-9]+(?:\s+[+-]?[0-9]+)+)\s*[\])]")
# Possessive: each character is looked at once. NumPy prints no commas between strings, which Python reads as one.
_QUOTED = re.compile(r"""("(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+')(\s++(?=["']))?""", re.DOTALL)


def as_list(cell: Any, what: str) -> list[Any]:
    """A list, or one that is written as text: JSON, Python's or NumPy's way, or words parted by spaces.

    Raises ValueError, about `what`, for a cell that is none of these.
    """
    if isinstance(cell, str):
        written = cell.strip()
        if not written.startswith(("[", "(")):
            return written.split()
        cell = _read_list(written)
    if isinstance(cell, np.ndarray):
        cell = cell.tolist()
    if not isinstance(cell, list | tuple):
        raise ValueError(f"{what} is {shown(cell)}; give a list")
    return list(cell)


def _read_list(written: str) -> Any:
    """What a text in brackets holds; the text itself if it cannot be read."""
    if numbers := _SPACED_NUMBERS.fullmatch(written):
        return numbers[1].split()
    for read in (json.loads, _literal):
        try:
            return read(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return written


def _literal(written: str) -> Any:
    return ast.literal_eval(_QUOTED.sub(lambda found: found[1] + ("," if found[2] else ""), written))


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    return "missing" if value is None else repr(shorten(str(value)))
