"""Which column holds the text, its pair and the label: as mapped, by name, or the only candidate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError, listed, nearest, raise_all, shorten
from shardyard_trainer.data.readers import Layout, NumberedRow, Table, layout_hint, open_table
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.reading import about, reading

_NAME = re.compile(r"[^\W\d](?:[\w.-]{0,62}\w)?")
"""What a column may be called: one word that begins with a letter and ends as no sentence does."""


@dataclass(frozen=True)
class Row:
    """One row: where it stands, and what the mapped columns hold."""

    file: str
    line: int
    text: str
    text_pair: str | None
    label: Any


def read_rows(
    files: list[DataFile], source: spec_pb2.DataSource, *, with_label: bool, field: str = "spec.train_data"
) -> Iterator[Row]:
    """The rows of all files, in order. Raises DataError, said of `field`, at the end also where no row has a text."""
    is_blank = True
    for file in files:
        about(field, "DATA_INVALID")
        reading(file.name)
        try:
            for row in _file_rows(file, source, with_label=with_label):
                is_blank = is_blank and not row.text.strip()
                yield row
        except DataError as error:
            found = [each.at(_place(field, each)) for each in error.all() if isinstance(each, DataError)]
            found[0].others = tuple(found[1:])
            raise found[0] from None
    if is_blank:
        raise DataError("the text of every row is empty", field=field)


def layout_key(source: spec_pb2.DataSource) -> list[str | int]:
    """All of a source that decides what `read_rows` makes of the same files, the same for a source and as resolved."""
    columns = source.columns
    document = source.document or spec_pb2.DOCUMENT_UNIT_LINE
    header = int(source.header) if source.HasField("header") else -1
    return [columns.text, columns.text_pair, columns.label, source.delimiter, document, header]


_MAPPED = ("text", "text_pair", "label")


def _place(field: str, error: DataError) -> str:
    return f"{field}.columns.{error.column}" if error.column in _MAPPED else field


def _file_rows(file: DataFile, source: spec_pb2.DataSource, *, with_label: bool) -> Iterator[Row]:
    table = open_table(file, Layout.of(source))
    text, pair, label = _choose(table, source.columns, with_label=with_label)
    places = [place for place in (text, pair, label) if place is not None]
    of_pair, of_label = (None if place is None else places.index(place) for place in (pair, label))
    for line, cells in table.rows(places):
        yield Row(
            file.name,
            line,
            _text(cells[0], file, line, table.columns[text]),
            None if of_pair is None or pair is None else _text(cells[of_pair], file, line, table.columns[pair]),
            None if of_label is None else cells[of_label],
        )


def _choose(table: Table, mapping: spec_pb2.ColumnMapping, *, with_label: bool) -> tuple[int, int | None, int | None]:
    taken = _mapped(table, {part: getattr(mapping, part) for part in _MAPPED if part != "label" or with_label})
    if "text_pair" not in taken and "text_pair" in table.columns and "text_pair" not in taken.values():
        taken["text_pair"] = "text_pair"
    if with_label and "label" not in taken and "label" in table.columns and "label" not in taken.values():
        taken["label"] = "label"
    if "text" not in taken:
        taken["text"] = _only_text_column(table, taken)
    if with_label and "label" not in taken:
        taken["label"] = _only_other_column(table, taken)
    _refuse_doubles(table, taken)
    pair = taken.get("text_pair")
    label = taken.get("label")
    return (
        table.index(taken["text"]),
        None if pair is None else table.index(pair),
        None if label is None else table.index(label),
    )


def _mapped(table: Table, wanted: dict[str, str]) -> dict[str, str]:
    """The columns that the spec names. Raises DataError with all that are not there."""
    taken: dict[str, str] = {}
    errors: list[DataError] = []
    for part, name in wanted.items():
        if not name:
            continue
        complaint = ""
        if name not in table.columns:
            complaint = (
                f"no column {shorten(name)!r}; there are: {listed(table.columns)}"
                f"{nearest(name, [*table.columns, *table.untaken])}{layout_hint(table)}"
            )
        elif name in taken.values():
            complaint = f"the column {name!r} is mapped twice"
        if complaint:
            errors.append(DataError(complaint, file=table.file.name, column=part, value=name))
        taken[part] = name
    raise_all(errors)
    return taken


def _refuse_doubles(table: Table, taken: dict[str, str]) -> None:
    for part, name in taken.items():
        if (times := table.columns.count(name)) > 1:
            message = (
                f"{times} columns are called {shorten(name)!r}, so it is not known which is the {part}; rename one"
            )
            raise DataError(message, file=table.file.name, column=part, value=name)


def _only_text_column(table: Table, taken: dict[str, str]) -> str:
    free = [name for name in table.columns if name not in taken.values()]
    if "text" in free:
        return "text"
    head = table.head()
    texts = [name for name in free if _looks_like_text([cells[table.index(name)] for _, cells in head])]
    if len(texts) == 1:
        _refuse_untaken_header(table, head)
        return texts[0]
    if texts:
        which = f"several could be ({listed(texts)}) of: {listed(table.columns)}"
    else:
        which = f"none holds text of: {listed(free)}" if free else "no other is left to be the text"
        if any(isinstance(cell, dict) for _, cells in head for cell in cells):
            which += " (a text inside of another object is not found: write it into the row itself)"
    used = {name: part for part, name in taken.items()}
    missing = f"the column `text` is mapped as {used['text']}" if "text" in used else "no column `text`"
    raise DataError(
        f"{missing}, and {which}; name it in columns.text{layout_hint(table)}",
        file=table.file.name,
        column="text",
    )


def _refuse_untaken_header(table: Table, head: Sequence[NumberedRow]) -> None:
    """Raises DataError where one word stands over a single column of texts that are none: it may be its name."""
    if len(table.untaken) != 1 or not _NAME.fullmatch(table.untaken[0]):
        return
    others = [cells[0].strip() for _, cells in head[1:]]
    if sum(not _NAME.fullmatch(text) for text in others) * 2 > len(others):
        raise DataError(
            f"the first of the texts is one word, which may be the column's name{layout_hint(table)}",
            file=table.file.name,
            column="text",
        )


def _only_other_column(table: Table, taken: dict[str, str]) -> str:
    free = [name for name in table.columns if name not in taken.values()]
    if len(free) == 1:
        return free[0]
    which = f"several could be ({listed(free)})" if free else "there is no other"
    raise DataError(
        f"no column `label`, and {which}; name it in columns.label (there are: {listed(table.columns)})"
        f"{layout_hint(table)}",
        file=table.file.name,
        column="label",
    )


def _looks_like_text(values: list[Any]) -> bool:
    strings = [value for value in values if isinstance(value, str)]
    return bool(strings) and not all(_is_number(value) for value in strings)


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _text(cell: Any, file: DataFile, line: int, column: str) -> str:
    if not isinstance(cell, str):
        what = "missing" if cell is None else f"a {type(cell).__name__} ({shorten(str(cell))})"
        then = "fill it in, or remove the row" if cell is None else "write it in quotes, or map another column"
        message = f"{shorten(column)!r} must be text, but is {what}; {then}"
        raise DataError(message, file=file.name, line=line, value=shorten(str(cell)))
    if "\0" in cell:
        raise DataError(f"{shorten(column)!r} has a NUL character; take it out", file=file.name, line=line)
    try:
        cell.encode()
    except UnicodeEncodeError:
        message = f"{shorten(column)!r} has half of a surrogate pair; write the whole character"
        raise DataError(message, file=file.name, line=line) from None
    return cell
