"""Rows of data files, strictly, with the line that each came from."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError, listed, shorten
from shardyard_trainer.data.lines import LONGEST_LINE_BYTES, read_lines
from shardyard_trainer.data.parquet import read_parquet
from shardyard_trainer.data.sources import DataFile

MOST_COLUMNS = 1024
_DEEPEST_JSON = 64
_ROWS_LOOKED_AT = 200
_OTHER_DELIMITERS = ";\t|,"
_MOST_DIGITS = 4300
"""Of an integer in JSON: Python reads no longer one, and says so in its own terms."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are written: what of a DataSource concerns the reading of a file."""

    header: bool | None = None
    delimiter: str = ""
    document: spec_pb2.DocumentUnit.ValueType = spec_pb2.DOCUMENT_UNIT_UNSPECIFIED
    names: frozenset[str] = frozenset()
    """Column names that tell a header from a row: the mapped ones, and `text` and `label`."""

    @classmethod
    def of(cls, source: spec_pb2.DataSource) -> Layout:
        """The layout that a source describes."""
        columns = source.columns
        mapped = {columns.text, columns.text_pair, columns.label} - {""}
        return cls(
            header=source.header if source.HasField("header") else None,
            delimiter=source.delimiter,
            document=source.document,
            names=frozenset(mapped | {"text", "label"}),
        )


@dataclass(frozen=True)
class Table:
    """A file's columns, and its rows as (line, cells); cells are strings, numbers, booleans, None or lists.

    `untaken` is the first line where nobody said whether it is a header, and it was not taken for one.
    """

    file: DataFile
    columns: tuple[str, ...]
    rows: Iterator[tuple[int, Sequence[Any]]]
    untaken: tuple[str, ...] = ()

    def index(self, name: str) -> int:
        """Where a column stands."""
        return self.columns.index(name)


def open_table(file: DataFile, layout: Layout) -> Table:
    """Opens a file of any format as a table; the rows are read as they are asked for.

    Raises DataError for an empty file, one with a header only, and (from `rows`) for a row that is not one.
    """
    reader = {
        spec_pb2.DATA_FORMAT_TEXT: _text_table,
        spec_pb2.DATA_FORMAT_JSONL: _jsonl_table,
        spec_pb2.DATA_FORMAT_CSV: _csv_table,
        spec_pb2.DATA_FORMAT_TSV: _tsv_table,
        spec_pb2.DATA_FORMAT_PARQUET: _parquet_table,
    }[file.format]
    return reader(file, layout)


def _text_table(file: DataFile, layout: Layout) -> Table:
    if layout.document == spec_pb2.DOCUMENT_UNIT_FILE:
        text = "".join(line for _, line in read_lines(file, keep_ends=True))
        rows: Iterable[tuple[int, Sequence[Any]]] = [(1, (text,))] if text.strip() else []
    else:
        rows = ((number, (line,)) for number, line in read_lines(file) if line.strip())
    return _checked(file, ("text",), iter(rows))


def _csv_table(file: DataFile, layout: Layout) -> Table:
    return _delimited(file, layout, _csv_rows(file, layout.delimiter or ","))


def _tsv_table(file: DataFile, layout: Layout) -> Table:
    return _delimited(file, layout, _tsv_rows(file, layout.delimiter or "\t"))


def _tsv_rows(file: DataFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    looked_at = 0
    for number, line in read_lines(file):
        if not line:
            continue
        cells = line.split(delimiter)
        if looked_at < _ROWS_LOOKED_AT and (quoted := next(filter(_is_quoted, cells), None)) is not None:
            raise DataError(
                f"{shorten(quoted)} is quoted, and TSV is read without quoting: give format CSV and a tab as delimiter",
                file=file.name,
                line=number,
                value=quoted,
            )
        looked_at += 1
        yield number, cells


def _is_quoted(cell: str) -> bool:
    """Whether quotes stand around a cell that has some inside, all of them doubled."""
    inside = cell[1:-1]
    is_framed = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return is_framed and '""' in inside and '"' not in inside.replace('""', "")


def _csv_rows(file: DataFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # The limit is the process's: every reader here wants this one.
    csv.field_size_limit(LONGEST_LINE_BYTES)
    lines = (line for _, line in read_lines(file, keep_ends=True))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        began = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(_csv_complaint(str(error), reader.line_num - began), file=file.name, line=began) from None
        if row:
            yield began, row


def _csv_complaint(error: str, more_lines: int) -> str:
    if "unexpected end" in error or "field larger" in error:
        return 'a quote that opens here is never closed; double a quote inside a quoted value, as in "say ""hi"""'
    if "expected after" in error:
        place = f", {more_lines} lines on" if more_lines else ""
        return f"something follows a closing quote{place}; double a quote inside a quoted value"
    if "universal-newline" in error:
        return (
            "a CR stands alone, as old spreadsheets end lines; save the file with LF or CRLF ends, or quote the value"
        )
    return f"not CSV: {error}"


def _delimited(file: DataFile, layout: Layout, rows: Iterator[tuple[int, list[str]]]) -> Table:
    first = next(rows, None)
    if first is None:
        raise DataError("the file is empty", file=file.name)
    line, cells = first
    stripped = [cell.strip() for cell in cells]
    has_header = layout.header if layout.header is not None else bool(layout.names & set(stripped))
    if has_header:
        # Spreadsheets write empty cells to the right of a header, pandas one over its index.
        columns = tuple(name or f"column_{i + 1}" for i, name in enumerate(stripped))
        body = rows
    else:
        columns = tuple(f"column_{i + 1}" for i in range(len(cells)))
        body = chain([first], rows)
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{len(columns):,} columns; at most {MOST_COLUMNS:,}", file=file.name, line=line)
    table = _checked(file, columns, _same_width(file, columns, body), header_only=has_header)
    return table if has_header or layout.header is not None else replace(table, untaken=tuple(stripped))


def _same_width(file: DataFile, columns: tuple[str, ...], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Any]:
    for line, cells in rows:
        if len(cells) != len(columns):
            hint = ""
            if file.format == spec_pb2.DATA_FORMAT_CSV and len(cells) > len(columns):
                hint = "; a value that has the delimiter in it must be quoted"
                if len(columns) == 1:
                    others = (f"`{other}`" for other in _OTHER_DELIMITERS if any(other in cell for cell in cells))
                    hint = f"; is {next(others, 'another character')} between the columns? give it as delimiter"
            raise DataError(f"{len(cells)} values in a row of {len(columns)} columns{hint}", file=file.name, line=line)
        yield line, cells


def layout_hint(table: Table) -> str:
    """What to say where a delimited file perhaps has another delimiter, or a header that was not taken for one."""
    if table.file.format not in (spec_pb2.DATA_FORMAT_CSV, spec_pb2.DATA_FORMAT_TSV):
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
        f"; the first line ({listed(table.untaken, most=8)}) was not taken for a header, as none of its names "
        "is mapped or is `text` or `label`: map them in columns, or set header"
    )


def _jsonl_table(file: DataFile, layout: Layout) -> Table:
    rows = _jsonl_rows(file)
    # A key may be missing where it has no value: one row alone does not tell them all.
    head = list(islice(rows, _ROWS_LOOKED_AT))
    if not head:
        raise DataError("the file is empty", file=file.name)
    columns = tuple(dict.fromkeys(name for _, row in head for name in row))
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{len(columns):,} keys; at most {MOST_COLUMNS:,}", file=file.name, line=head[0][0])
    cells = ((line, [row.get(name) for name in columns]) for line, row in chain(head, rows))
    return Table(file, columns, cells)


def _jsonl_rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(file):
        if line.strip():
            yield number, _json_object(line, file.name, number)


def _json_object(line: str, name: str, number: int) -> dict[str, Any]:
    if line.count("[") + line.count("{") > _DEEPEST_JSON and _depth(line) > _DEEPEST_JSON:
        raise DataError(f"JSON nested deeper than {_DEEPEST_JSON}", file=name, line=number)
    try:
        value = json.loads(
            line, parse_constant=_refuse, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique
        )
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos + 1}", file=name, line=number) from None
    except ValueError as error:
        raise DataError(f"not JSON: {error}", file=name, line=number) from None
    if not isinstance(value, dict):
        raise DataError('not a JSON object; each line must be one, such as {"text": …}', file=name, line=number)
    return value


def _depth(line: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for character in line:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is too large for a number")
    return value


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(
            f"{shorten(text)} has {len(text):,} digits; a number has at most {_MOST_DIGITS:,}; quote it if it is text"
        )
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shorten(next(n for n in names if names.count(n) > 1))!r} stands twice")
    return found


def _parquet_table(file: DataFile, layout: Layout) -> Table:
    columns, rows = read_parquet(file, MOST_COLUMNS, needed=layout.names)
    if doubled := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"a column's name stands twice: {listed(doubled)}", file=file.name)
    return Table(file, columns, rows)


def _checked(file: DataFile, columns: tuple[str, ...], rows: Iterator[Any], *, header_only: bool = False) -> Table:
    first = next(rows, None)
    if first is None:
        raise DataError("no rows after the header" if header_only else "the file is empty", file=file.name)
    return Table(file, columns, chain([first], rows))
