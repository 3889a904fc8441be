"""Data files of every format as tables: their columns, a look at the first rows, and the rows of chosen columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, TypeAlias

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows, refuse
from shardyard_trainer.data.conll import ConllFile
from shardyard_trainer.data.csv_rows import read_csv_rows, read_tsv_rows, read_unix_lines, width_hint
from shardyard_trainer.data.errors import DataError, listed, shorten
from shardyard_trainer.data.interaction_rows import PAIR, read_interaction_rows, untyped
from shardyard_trainer.data.json_rows import read_json_rows
from shardyard_trainer.data.lines import read_lines
from shardyard_trainer.data.parquet import ParquetTable
from shardyard_trainer.data.sources import DataFile

MOST_COLUMNS = 1024
_ROWS_LOOKED_AT = 200
_HEAD_CHARACTERS = 2**24
"""Characters kept of the first rows at most, however long these are."""

_OTHER_DELIMITERS = ";\t|,"

NumberedRow: TypeAlias = tuple[int, Sequence[Any]]


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are written: the part of a DataSource that decides how a file is read."""

    header: bool | None = None
    delimiter: str = ""
    document: spec_pb2.DocumentUnit.ValueType = spec_pb2.DOCUMENT_UNIT_UNSPECIFIED
    names: frozenset[str] = frozenset()
    """Column names that tell a header from a row: the mapped ones, `text`, `label` and `labels`."""
    has_records: bool = False
    """Whether a cell may be a record, or a list of them."""
    has_pictures: bool = False
    """Whether a cell of Parquet may hold the bytes of a picture."""
    times: frozenset[str] = frozenset()
    """Columns that may hold points in time, which Parquet has types for: they are read as microseconds since 1970."""
    bad: BadRows | None = None
    """Collects unusable rows; None: the first one is raised."""

    @property
    def skip(self) -> Callable[[DataError], None]:
        """Takes a row's error: skips the row, or raises the error."""
        return refuse if self.bad is None else self.bad.skip

    @classmethod
    def of(
        cls,
        source: spec_pb2.DataSource,
        more: Iterable[str] = (),
        *,
        has_records: bool = False,
        times: Iterable[str] = (),
        bad: BadRows | None = None,
    ) -> Layout:
        """The layout that a source describes; `more` columns are mapped elsewhere, `times` may hold points in time."""
        return cls(
            header=source.header if source.HasField("header") else None,
            delimiter=source.delimiter,
            document=source.document,
            names=frozenset({*source.columns.values(), *more} - {""}) | {"text", "label", "labels"},
            has_records=has_records,
            bad=bad,
            times=frozenset(times),
        )


@dataclass(frozen=True)
class Table:
    """A file's columns, and its rows as (line, cells); cells are strings, numbers, booleans, None or lists.

    `head` gives some of the first rows with all columns, None for what is only read when it is asked for; `rows` gives
    all rows, once, with the columns of these places in this order. `untaken` is the first line if it may be a header
    but was not taken for one. `class_names` are names of a column's numbers. `left_out` are columns that
    cannot be read.
    """

    file: DataFile
    columns: tuple[str, ...]
    head: Callable[[], Sequence[NumberedRow]]
    rows: Callable[[Sequence[int]], Iterator[NumberedRow]]
    untaken: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def index(self, name: str) -> int:
        """The position of a column. Raises ValueError for an unknown name."""
        return self.columns.index(name)


def open_table(file: DataFile, layout: Layout) -> Table:
    """Opens a file of any format as a table; rows are read on demand.

    Raises DataError for an empty file, one with a header only, and (from `rows`) for a row that is not one.
    """
    readers = {
        spec_pb2.DATA_FORMAT_TEXT: _text_table,
        spec_pb2.DATA_FORMAT_JSONL: _jsonl_table,
        spec_pb2.DATA_FORMAT_CSV: _csv_table,
        spec_pb2.DATA_FORMAT_TSV: _tsv_table,
        spec_pb2.DATA_FORMAT_PARQUET: _parquet_table,
        spec_pb2.DATA_FORMAT_CONLL: _conll_table,
        spec_pb2.DATA_FORMAT_INTERACTIONS: _interactions_table,
    }
    if file.format not in readers:
        text = "a picture, but the task reads a table or texts; give those, or a task for pictures"
        raise DataError(text, file=file.name)
    return readers[file.format](file, layout)


def _text_table(file: DataFile, layout: Layout) -> Table:
    if layout.document == spec_pb2.DOCUMENT_UNIT_FILE:
        text = "".join(line for _, line in read_lines(file, keep_ends=True))
        rows: Iterable[NumberedRow] = [(1, (text,))] if text.strip() else []
    else:
        rows = ((number, (line,)) for number, line in read_unix_lines(file, layout.skip) if line.strip())
    return _row_table(file, layout, ("text",), iter(rows))


def _conll_table(file: DataFile, layout: Layout) -> Table:
    """Words and tags, then all columns by their numbers, for a mapping."""
    found = ConllFile(file, layout.skip)
    names = ("tokens", "tags", *(f"column_{place + 1}" for place in range(found.width)))
    return _row_table(
        file, layout, names, ((line, [cells[found.words], cells[-1], *cells]) for line, cells in found.texts())
    )


def _csv_table(file: DataFile, layout: Layout) -> Table:
    return _delimited(file, layout, read_csv_rows(file, layout.delimiter, layout.skip))


def _tsv_table(file: DataFile, layout: Layout) -> Table:
    return _delimited(file, layout, read_tsv_rows(file, layout.delimiter, layout.skip))


def _interactions_table(file: DataFile, layout: Layout) -> Table:
    rows = read_interaction_rows(file, layout.delimiter, layout.skip)
    first = next(rows, None)
    if first is None:
        raise _empty(file, layout)
    table = _delimited(file, layout, chain([first], rows))
    is_pair = table.columns == ("column_1", "column_2") and not layout.names & set(table.columns)
    return replace(table, columns=PAIR) if is_pair else table


def _delimited(file: DataFile, layout: Layout, rows: Iterator[tuple[int, list[str]]]) -> Table:
    first = next(rows, None)
    if first is None:
        raise _empty(file, layout)
    line, cells = first
    if len(cells) > MOST_COLUMNS:
        raise _too_many(file, f"{len(cells):,} columns", line)
    typed = untyped(cells)
    stripped = typed or [cell.strip() for cell in cells]
    is_named = typed is not None or bool(layout.names & set(stripped))
    has_header = layout.header if layout.header is not None else is_named
    if has_header:
        # Spreadsheets write empty cells to the right of a header, pandas one over its index.
        columns = tuple(name or f"column_{i + 1}" for i, name in enumerate(stripped))
        body: Iterator[tuple[int, list[str]]] = rows
    else:
        columns = tuple(f"column_{i + 1}" for i in range(len(cells)))
        body = chain([first], rows)
    table = _row_table(file, layout, columns, _same_width(file, columns, body, layout.skip), header_only=has_header)
    return table if has_header or layout.header is not None else replace(table, untaken=tuple(stripped))


def _same_width(
    file: DataFile,
    columns: tuple[str, ...],
    rows: Iterator[tuple[int, list[str]]],
    skip: Callable[[DataError], None],
) -> Iterator[NumberedRow]:
    for line, cells in rows:
        if len(cells) != len(columns):
            hint = "; give each row a value for each column, an empty one too"
            if file.format == spec_pb2.DATA_FORMAT_CSV and len(cells) > len(columns):
                hint = width_hint(cells, len(columns), _OTHER_DELIMITERS)
            message = f"{len(cells)} values in a row of {len(columns)} columns{hint}"
            skip(DataError(message, file=file.name, line=line))
        else:
            yield line, cells


def layout_hint(table: Table) -> str:
    """A hint if a delimited file may have another delimiter, or a header that was not recognised."""
    delimited = (spec_pb2.DATA_FORMAT_CSV, spec_pb2.DATA_FORMAT_TSV, spec_pb2.DATA_FORMAT_INTERACTIONS)
    if table.file.format not in delimited:
        return ""
    if len(table.columns) == 1:
        _, first = next(read_lines(table.file))
        found = [d for d in _OTHER_DELIMITERS if d in first]
        names = {"\t": "a tab (format TSV)"}
        if found:
            return f"; the file has one column: is its delimiter {names.get(found[0], repr(found[0]))}?"
    if not table.untaken:
        return ""
    return (
        f"; the first line ({listed(table.untaken, most=8)}) was not taken for a header, as none of its names is "
        "mapped or one that the task looks for: map them in columns, or set header"
    )


def _jsonl_table(file: DataFile, layout: Layout) -> Table:
    rows = read_json_rows(file, layout.skip)
    # A key may be missing if it has no value, so one row alone may not show all of them.
    head = list(_some(rows, lambda row: row.values()))
    if not head:
        raise _empty(file, layout)
    columns = tuple(dict.fromkeys(name for _, row in head for name in row))
    if len(columns) > MOST_COLUMNS:
        raise _too_many(file, f"{len(columns):,} keys", head[0][0])
    if len(head) == 1:
        _refuse_wrapped(file, *head[0], names=layout.names)
    return _row_table(
        file, layout, columns, ((line, [row.get(name) for name in columns]) for line, row in chain(head, rows))
    )


def _refuse_wrapped(file: DataFile, line: int, row: dict[str, Any], *, names: frozenset[str]) -> None:
    """Raises DataError if the file is one object around its rows, as some tools and pandas export them."""
    if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
        message = (
            f"one object of columns ({listed(row, most=8)}) instead of rows; write one object a row, "
            "in pandas: to_json(path, orient='records', lines=True)"
        )
        raise DataError(message, file=file.name, line=line)
    for key, value in row.items():
        if not names & set(row) and isinstance(value, list) and value and isinstance(value[0], dict):
            message = f"one object, whose key {shorten(key)!r} holds a list of rows; save that list alone"
            raise DataError(message, file=file.name, line=line)


def _parquet_table(file: DataFile, layout: Layout) -> Table:
    table = ParquetTable(
        file,
        MOST_COLUMNS,
        needed=layout.names,
        has_records=layout.has_records,
        has_pictures=layout.has_pictures,
        times=layout.times,
    )
    names = table.class_names()
    return Table(
        file,
        table.columns,
        lambda: table.head(_ROWS_LOOKED_AT),
        table.rows,
        class_names=names,
        left_out=table.left_out,
    )


def _row_table(
    file: DataFile,
    layout: Layout,
    columns: tuple[str, ...],
    rows: Iterator[NumberedRow],
    *,
    header_only: bool = False,
) -> Table:
    """A table whose rows are read whole, whichever columns are requested."""
    head = list(_some(rows, iter))
    if not head:
        raise _empty(file, layout, header_only=header_only)

    def chosen(places: Sequence[int]) -> Iterator[NumberedRow]:
        return ((line, [cells[place] for place in places]) for line, cells in chain(head, rows))

    return Table(file, columns, lambda: head, chosen)


def _some(rows: Iterator[tuple[int, Any]], values: Callable[[Any], Iterable[Any]]) -> Iterator[tuple[int, Any]]:
    """The first rows, bounded in number and size."""
    size = 0
    for line, row in islice(rows, _ROWS_LOOKED_AT):
        yield line, row
        size += sum(len(value) for value in values(row) if isinstance(value, str | list))
        if size > _HEAD_CHARACTERS:
            return


def _empty(file: DataFile, layout: Layout, *, header_only: bool = False) -> DataError:
    """The error about a file without rows; if all its rows are bad, the first one's error."""
    if layout.bad is not None and (first := layout.bad.first_of(file.name)):
        return first
    if header_only:
        return DataError("no rows after the header; if the file was cut short, copy it again", file=file.name)
    return DataError("the file is empty; if it should not be, copy it again", file=file.name)


def _too_many(file: DataFile, what: str, line: int) -> DataError:
    message = f"{what}; at most {MOST_COLUMNS:,}; keep those with text and labels"
    return DataError(message, file=file.name, line=line)
