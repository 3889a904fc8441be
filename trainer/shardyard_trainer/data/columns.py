"""Which column holds the text, its pair and the label: as mapped, by name, or the only candidate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, SpecError, listed, nearest, raise_all, shorten
from shardyard_trainer.data.label_canon import as_bit
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.data.readers import Layout, NumberedRow, Table, layout_hint, open_table
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.reading import about, reading

LABEL_COLUMNS_FIELD = "spec.fine_tuning.text_classification.label_columns"
_NAME = re.compile(r"[^\W\d](?:[\w.-]{0,62}\w)?")
"""Looks like a column name: one word, starts with a letter, no punctuation at the end of a sentence."""


@dataclass(frozen=True)
class Row:
    """One row: its file and line, and the values of the mapped columns."""

    file: str
    line: int
    text: str
    text_pair: str | None
    label: Any
    label_names: tuple[str, ...] = ()
    """The label columns, if there are several; `label` is then a tuple of their values."""


def read_rows(
    files: list[DataFile],
    source: spec_pb2.DataSource,
    *,
    with_label: bool,
    several_labels: bool = False,
    label_columns: Sequence[str] = (),
    field: str = "spec.train_data",
    bad: BadRows | None = None,
) -> Iterator[Row]:
    """Yields the rows of all files in order; with `several_labels`, a text may have one column for each class.

    `label_columns` are those of the classes if the spec names them. Rows that cannot be read go to `bad`, if the caller
    has one and finishes it.

    Raises DataError for `field`, at the end also if no row has a text.
    """
    wanted = _Wanted(with_label, several_labels, tuple(label_columns))
    is_blank, own, num_rows = True, bad or BadRows(source), 0
    for file in files:
        about(field, "DATA_INVALID")
        reading(file.name)
        try:
            for row in _file_rows(file, source, wanted, own):
                num_rows += 1
                is_blank = is_blank and not row.text.strip()
                yield row
        except DataError as error:
            found = [each.at(_place(field, each)) for each in error.all() if isinstance(each, DataError)]
            found[0].others = tuple(found[1:])
            raise found[0] from None
    if bad is None:
        own.finish(num_rows, field)
    if is_blank and num_rows:
        raise DataError("the text of every row is empty; map the column with texts in columns.text", field=field)


def check_roles(source: spec_pb2.DataSource, roles: Sequence[str], *, task: str, field: str) -> Iterator[SpecError]:
    """Returns an error for the first mapped role that the task does not have."""
    for role, column in sorted(source.columns.items()):
        if role not in roles:
            yield SpecError(
                f"{field}.columns",
                "SPEC_INVALID",
                f"{shorten(role)!r} (mapped to {shorten(column)!r}): {task} has the roles {', '.join(roles)}"
                f"{nearest(role, roles)}",
            )


def layout_key(source: spec_pb2.DataSource) -> list[Any]:
    """Everything in a source that decides how its files are read, as JSON: equal for a source and its resolved form."""
    document = source.document or spec_pb2.DOCUMENT_UNIT_LINE
    header = int(source.header) if source.HasField("header") else -1
    bad = [source.max_bad_rows_share] if source.max_bad_rows_share else []
    return [sorted(source.columns.items()), source.delimiter, document, header, *bad]


_ROLES = ("text", "text_pair", "label")
_LABEL_COLUMNS = "label_columns"


class _Wanted(NamedTuple):
    with_label: bool
    several_labels: bool
    label_columns: tuple[str, ...]


class _Chosen(NamedTuple):
    """The names of the columns chosen for the roles of a text."""

    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    is_one_label: bool


def _place(field: str, error: DataError) -> str:
    if error.column == _LABEL_COLUMNS:
        return LABEL_COLUMNS_FIELD
    return f"{field}.columns.{error.column}" if error.column in _ROLES else field


def _file_rows(file: DataFile, source: spec_pb2.DataSource, wanted: _Wanted, bad: BadRows) -> Iterator[Row]:
    table = open_table(file, Layout.of(source, wanted.label_columns, bad=bad))
    chosen = _choose(table, source.columns, wanted)
    has_pair = chosen.text_pair is not None
    names = [chosen.text, *([chosen.text_pair] if chosen.text_pair is not None else []), *chosen.labels]
    first_label = 1 + has_pair
    label_names = () if chosen.is_one_label else chosen.labels
    for line, cells in table.rows([table.index(name) for name in names]):
        labels = cells[first_label:]
        try:
            text = _text(cells[0], file, line, chosen.text)
            text_pair = _text(cells[1], file, line, names[1]) if has_pair else None
        except DataError as error:
            bad.skip(error)
            continue
        label = tuple(labels) if label_names else labels[0] if labels else None
        yield Row(file.name, line, text, text_pair, label, label_names)


def _choose(table: Table, mapping: Mapping[str, str], wanted: _Wanted) -> _Chosen:
    several = _several_mapped(table, mapping, wanted)
    with_label = wanted.with_label and not several
    taken = _mapped(table, {part: mapping.get(part, "") for part in _ROLES if part != "label" or with_label})
    if "text_pair" not in taken and "text_pair" in table.columns and "text_pair" not in taken.values():
        taken["text_pair"] = "text_pair"
    if with_label and "label" not in taken and (named := _named_label(table, taken, wanted)):
        taken["label"] = named
    if "text" not in taken:
        taken["text"] = _only_text_column(table, {**taken, **{f"label {name}": name for name in several}})
    if with_label and wanted.several_labels and "label" not in taken:
        several = _columns_of_bits(table, taken)
    if with_label and "label" not in taken and not several:
        taken["label"] = _only_other_column(table, taken)
    _refuse_doubles(table, [*taken.items(), *((_LABEL_COLUMNS, name) for name in several)])
    labels = several or ((taken["label"],) if "label" in taken else ())
    return _Chosen(taken["text"], taken.get("text_pair"), labels, is_one_label=not several)


def _named_label(table: Table, taken: dict[str, str], wanted: _Wanted) -> str:
    """The column `label`, or `labels` as some libraries name it; empty if neither exists. Raises DataError for both."""
    found = [name for name in ("label", "labels") if name in table.columns and name not in taken.values()]
    if len(found) > 1 and wanted.several_labels:
        raise DataError(
            "the columns `label` and `labels` may both be the labels of a text; name one in columns.label",
            file=table.file.name,
            column="label",
        )
    return found[0] if found else ""


def _several_mapped(table: Table, mapping: Mapping[str, str], wanted: _Wanted) -> tuple[str, ...]:
    """The label columns that the spec names, one for each class. Raises DataError."""
    names = wanted.label_columns
    if not names or not wanted.with_label:
        return ()
    complaint, name = "", ""
    if not wanted.several_labels:
        complaint = "several label columns are for problem multi_label: set it, or map one column in columns.label"
    elif label := mapping.get("label"):
        complaint = f"columns.label maps {shorten(label)!r} too; leave one of the two out"
    elif missing := [name for name in names if name not in table.columns]:
        name = missing[0]
        complaint = (
            f"no column {listed(missing, most=8)}; there are: {listed(table.columns)}"
            f"{nearest(name, [*table.columns, *table.untaken])}{layout_hint(table)}"
        )
    elif doubled := {
        *(each for each in names if names.count(each) > 1),
        *({mapping.get("text", ""), mapping.get("text_pair", "")} & {*names}),
    }:
        name = min(doubled)
        complaint = f"the column {shorten(name)!r} is mapped twice; leave one out"
    if complaint:
        raise DataError(complaint, file=table.file.name, column=_LABEL_COLUMNS, value=name)
    return names


def _columns_of_bits(table: Table, taken: dict[str, str]) -> tuple[str, ...]:
    """Finds a common layout: two or more columns of only 0 and 1, one for each class."""
    free = [place for place, name in enumerate(table.columns) if name not in taken.values()]
    head = table.head() if len(free) > 1 else []
    found = tuple(
        table.columns[place] for place in free if head and all(as_bit(cells[place]) is not None for _, cells in head)
    )
    return found if len(found) > 1 else ()


def _mapped(table: Table, wanted: dict[str, str]) -> dict[str, str]:
    """The columns that the spec names. Raises DataError that lists every missing one."""
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
            complaint = f"the column {name!r} is mapped twice; leave one out"
        if complaint:
            errors.append(DataError(complaint, file=table.file.name, column=part, value=name))
        taken[part] = name
    raise_all(errors)
    return taken


def _refuse_doubles(table: Table, taken: Iterable[tuple[str, str]]) -> None:
    for part, name in taken:
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
            which += " (a text inside another object is not found: write it into the row itself)"
    used = {name: part for part, name in taken.items()}
    missing = f"the column `text` is mapped as {used['text']}" if "text" in used else "no column `text`"
    raise DataError(
        f"{missing}, and {which}; name it in columns.text{layout_hint(table)}",
        file=table.file.name,
        column="text",
    )


def _refuse_untaken_header(table: Table, head: Sequence[NumberedRow]) -> None:
    """Raises DataError if the first row is one word above longer texts: probably an unrecognised header."""
    if len(table.untaken) != 1 or not _NAME.fullmatch(table.untaken[0]):
        return
    others = [cells[0].strip() for _, cells in head[1:]]
    if sum(not _NAME.fullmatch(text) for text in others) * 2 > len(others):
        raise DataError(
            f"the first row is one word above longer texts: probably an unrecognised header{layout_hint(table)}",
            file=table.file.name,
            column="text",
        )


def _only_other_column(table: Table, taken: dict[str, str]) -> str:
    free = [name for name in table.columns if name not in taken.values()]
    if len(free) == 1:
        return free[0]
    which = f"several could be ({listed(free)})" if free else "there is no other"
    raise DataError(
        f"no column `label` or `labels`, and {which}; name it in columns.label (there are: {listed(table.columns)})"
        f"{layout_hint(table)}",
        file=table.file.name,
        column="label",
    )


def _looks_like_text(values: list[Any]) -> bool:
    strings = [value for value in values if isinstance(value, str)]
    return bool(strings) and not all(_is_number(value) or as_bit(value) is not None for value in strings)


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
    if fault := unreadable(cell):
        raise DataError(f"{shorten(column)!r} has {fault}", file=file.name, line=line)
    return cell
