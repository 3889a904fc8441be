"""Lists in one cell: real lists, or text as JSON, Python or NumPy write them, or words separated by spaces."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardyard_trainer.data.errors import shorten

_SPACED_NUMBERS = re.compile(r"[\[(]\s*([+-]?[0-9]+(?:\s+[+-]?[0-9]+)+)\s*[\])]")
# Possessive, so linear. NumPy prints no commas between strings, which Python would join into one.
_QUOTED = re.compile(r"""("(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+')(\s++(?=["']))?""", re.DOTALL)

# pandas writes the arrays inside a record with their class and type; text in quotes is left alone.
_ARRAYS = re.compile(
    r"""("(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+')|\barray\((?=\[)|(?<=\])(?:,\s*dtype=\w++)?\)""", re.DOTALL
)


def as_list(cell: Any, what: str) -> list[Any]:
    """A list, or text that contains one: as JSON, Python or NumPy write it, or words separated by spaces.

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


def as_value(cell: Any) -> Any:
    """What a cell holds: itself, or what its text says in brackets as JSON, Python or pandas write it; blank: None."""
    if not isinstance(cell, str):
        return cell
    written = cell.strip()
    if not written.startswith(("[", "(", "{")):
        return cell if written else None
    return _read_list(_ARRAYS.sub(lambda found: found[1] or "", written))


def texts_in(cell: Any) -> list[Any] | None:
    """The list of texts, or of records with texts, that a cell holds, itself or as text; None if it holds no list."""
    if not isinstance(cell, str):
        return list(cell) if isinstance(cell, list | tuple) else None
    found = as_value(cell) if cell.lstrip().startswith("[") else None
    # `[2020]` is a text that begins with a bracket.
    return list(found) if isinstance(found, list) and all(isinstance(each, str | Mapping) for each in found) else None


def _read_list(written: str) -> Any:
    """The list in a bracketed text; the text itself if it cannot be read."""
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
