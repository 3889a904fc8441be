"""Files with one interaction a line: RecBole's typed header, or columns separated by tabs, `::` or spaces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from shardyard_trainer.data.csv_rows import read_unix_lines
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.sources import DataFile

PAIR = ("user", "item")
"""The column names of a file with two columns and no header."""

_TYPED = re.compile(r"([^:]+):(token|token_seq|float|float_seq)")


def read_interaction_rows(
    file: DataFile, delimiter: str, skip: Callable[[DataError], None]
) -> Iterator[tuple[int, list[str]]]:
    """Each line that is not blank, split as its first one is. `delimiter` empty: a tab, `::`, or spaces."""
    split: Callable[[str], list[str]] | None = None
    for number, line in read_unix_lines(file, skip):
        if not line.strip():
            continue
        if split is None:
            between = delimiter or next((each for each in ("\t", "::") if each in line), None)
            if between is None and untyped(line.split(",")) is not None:
                between = ","
            split = _splitter(between)
        yield number, split(line)


def _splitter(between: str | None) -> Callable[[str], list[str]]:
    return lambda line: line.split(between) if between is None else line.rstrip("\r\n").split(between)


def untyped(cells: Sequence[str]) -> list[str] | None:
    """The names of a typed header such as `user_id:token`; None if the line is not such a header."""
    found = [_TYPED.fullmatch(cell.strip()) for cell in cells]
    return [match[1] for match in found if match] if all(found) else None
