"""Rows of a Parquet file in bounded memory, whatever the file claims; columns not requested are not decoded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardyard_trainer.data.containers import LARGEST_RATIO, allowed_bytes, check_parquet
from shardyard_trainer.data.errors import DataError, listed, shorten
from shardyard_trainer.data.lines import LONGEST_LINE_BYTES
from shardyard_trainer.data.parquet_pages import Page, PageInvalid, read_pages
from shardyard_trainer.data.sources import DataFile, open_regular

_BATCH_ROWS = 512
_BATCH_BYTES = 64 * 2**20
_LARGEST_PAGE = 256 * 2**20
_MOST_PAGES = 100_000
"""Pages of one column in one row group at most."""

_HEAD_CHARACTERS = 2**22
_LONGEST_LIST = 100_000
_CELL_BYTES = 128
"""Bytes charged for the smallest cell: a run of one value is a few bytes and decodes to any number of rows."""

_LONGEST_METADATA = 2**22
_DEEPEST_RECORDS = 8

_READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


class ParquetTable:
    """An open file: the columns that can be text or label, and the rows of selected columns.

    Raises DataError, also from the iterators. A column of another type is refused if it is of a `needed` name, else
    left out of `columns`. Those of `times` may hold points in time, which become microseconds since 1970.
    """

    def __init__(
        self,
        file: DataFile,
        most_columns: int,
        *,
        needed: Container[str],
        has_records: bool = False,
        has_pictures: bool = False,
        times: Container[str] = frozenset(),
    ) -> None:
        self._file = file
        self._has_records = has_records
        self._has_pictures = has_pictures
        self._times = times
        self._allowed = allowed_bytes(file.path.stat().st_size)
        self._stream = open_regular(file.path, file.name)
        check_parquet(file, self._stream)
        opened = self._open([])
        if not opened.metadata.num_rows or not opened.metadata.num_row_groups:
            raise DataError("the file has no rows; if it should have, write it again", file=file.name)
        names = opened.schema_arrow.names
        if len(names) > most_columns:
            message = f"{len(names):,} columns; at most {most_columns:,}; keep those with text and labels"
            raise DataError(message, file=file.name)
        if doubled := sorted({name for name in names if names.count(name) > 1 and name in needed}):
            message = f"duplicate column name: {listed(doubled)}; rename one"
            raise DataError(message, file=file.name)
        self._fields = {field.name: field.type for field in opened.schema_arrow if self._is_usable(field, needed)}
        if not self._fields:
            text = "no column can be text or labels: those are strings, numbers or lists; all have other types"
            raise DataError(text, file=file.name)
        self.columns = tuple(self._fields)
        self.left_out = tuple(dict.fromkeys(name for name in names if name not in self._fields))
        # Read as a dictionary, a text that a list repeats is in memory once.
        lists = [name for name, kind in self._fields.items() if not _is_plain(_undictionaried(kind))]
        self._opened = self._open([path for path in self._string_leaves(opened) if _is_below(path, lists)])

    def head(self, most: int) -> list[tuple[int, Sequence[Any]]]:
        """Some of the first rows; None for lists, which are not texts, and for columns that do not decode."""
        rows = [[None] * len(self.columns) for _ in range(min(most, self._opened.metadata.row_group(0).num_rows))]
        for place, kind in enumerate(self._fields.values()):
            size = 0
            if not _is_plain(_undictionaried(kind)):
                continue
            with contextlib.suppress(DataError):
                for row, (_, cells) in zip(rows, self._read([place], most_groups=1), strict=False):
                    row[place] = cells[0]
                    size += len(cells[0]) if isinstance(cells[0], str) else 0
                    if size > _HEAD_CHARACTERS:
                        break
        return [(number + 1, row) for number, row in enumerate(rows)]

    def rows(self, places: Sequence[int]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yields all rows, numbered from 1, with the columns at these positions."""
        num_rows = 0
        for line, cells in self._read(places):
            num_rows = line
            yield line, cells
        if num_rows != (claimed := self._opened.metadata.num_rows):
            message = f"the footer says {claimed:,} rows, but the file has {num_rows:,}; write it again"
            raise DataError(message, file=self._file.name)

    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the numbers of columns, as the library datasets leaves them in the file."""
        written = (self._opened.schema_arrow.metadata or {}).get(b"huggingface", b"")
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
            features = json.loads(written)["info"]["features"] if len(written) <= _LONGEST_METADATA else {}
            found = {name: _class_names(features.get(name)) for name in self.columns}
            return {name: names for name, names in found.items() if names}
        return {}

    def _open(self, dictionaries: list[str]) -> Any:
        try:
            return pq.ParquetFile(self._stream, read_dictionary=dictionaries)
        except _READ_ERRORS as error:
            message = f"not a readable Parquet file: {_first_line(error)}; copy it again, or write it again"
            raise DataError(message, file=self._file.name) from None

    def _is_usable(self, field: Any, needed: Container[str]) -> bool:
        kind = _undictionaried(field.type)
        if field.name in self._times and _is_time(kind):
            return True
        if _is_plain(kind) or (_is_list(kind) and _is_plain(_undictionaried(kind.value_type))):
            return True
        if self._has_records and field.name in needed and _is_records(kind):
            return True
        if self._has_pictures and _is_picture(kind):
            return True
        if field.name in needed:
            wanted = (
                "cells are texts, numbers, and lists and records of them, "
                f"{_DEEPEST_RECORDS} levels at most: save it as JSONL, or write its cells as JSON text"
                if self._has_records and _is_nested(kind)
                else "text and labels are strings, numbers or lists of them: cast it, or map another column"
            )
            raise DataError(
                f"column {shorten(field.name)!r} is {shorten(str(field.type))}; {wanted}",
                file=self._file.name,
                column=field.name,
            )
        return False

    def _string_leaves(self, opened: Any) -> list[str]:
        """Paths, as in the file, of the columns that hold strings."""
        schema = opened.schema
        every = (schema.column(place) for place in range(len(schema.names)))
        return [leaf.path for leaf in every if leaf.physical_type == "BYTE_ARRAY"]

    def _read(self, places: Sequence[int], *, most_groups: int = 2**31) -> Iterator[tuple[int, Sequence[Any]]]:
        names = [self.columns[place] for place in places]
        row = decoded = 0
        try:
            for group in range(min(most_groups, self._opened.metadata.num_row_groups)):
                pages, batch_rows = self._weigh(group, names)
                decoded += pages
                self._check(decoded)
                for batch in self._opened.iter_batches(
                    batch_size=batch_rows, row_groups=[group], columns=names, use_threads=False
                ):
                    columns = [self._values(batch.column(batch.schema.get_field_index(name)), row) for name in names]
                    decoded += sum(self._cost(values, row) for values in columns)
                    self._check(decoded)
                    for cells in zip(*columns, strict=True):
                        row += 1
                        yield row, cells
        except PageInvalid as error:
            raise DataError(f"damaged after row {row:,}: {error}; copy it again", file=self._file.name) from None
        except _READ_ERRORS as error:
            message = f"damaged after row {row:,}: {_first_line(error)}; copy it again, or write it again"
            raise DataError(message, file=self._file.name) from None

    def _weigh(self, group: int, names: Sequence[str]) -> tuple[int, int]:
        """The decoded size of the pages of some columns, and how many rows fit into memory at once."""
        decoded, largest_value = 0, 1
        metadata = self._opened.metadata.row_group(group)
        for place in range(metadata.num_columns):
            chunk = metadata.column(place)
            if not _is_below(chunk.path_in_schema, names):
                continue
            offsets = [chunk.data_page_offset, chunk.dictionary_page_offset]
            start = min(offset for offset in offsets if offset)
            for number, page in enumerate(read_pages(self._stream, start, chunk.total_compressed_size)):
                self._check_page(page, number)
                decoded += page.num_bytes + 8 * page.num_values
                self._check(decoded)
                # A dictionary may be one value that each row repeats.
                largest_value = max(largest_value, page.num_bytes // max(page.num_values, 1))
        return decoded, max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest_value))

    def _check_page(self, page: Page, number: int) -> None:
        if page.num_bytes > _LARGEST_PAGE:
            raise DataError(
                f"a page decodes to {page.num_bytes:,} bytes; at most {_LARGEST_PAGE:,}; write the file with fewer "
                "rows in a page",
                file=self._file.name,
            )
        if number >= _MOST_PAGES:
            message = f"a row group with more than {_MOST_PAGES:,} pages; write the file again"
            raise DataError(message, file=self._file.name)

    def _check(self, decoded: int) -> None:
        if decoded > self._allowed:
            raise DataError(
                f"decodes to more than {self._allowed:,} bytes, over {LARGEST_RATIO} times its size; "
                "if that is meant, save it as JSONL",
                file=self._file.name,
            )

    def _cost(self, values: Sequence[Any], row: int) -> int:
        """Estimates the memory of a column's cells in Python. Raises DataError for a value that is too long."""
        lengths = [len(value) if isinstance(value, str) else 0 for value in values]
        if (longest := max(lengths, default=0)) > LONGEST_LINE_BYTES:
            message = f"a value of {longest:,} characters; at most 16 MiB; break the text into rows"
            raise DataError(message, file=self._file.name, line=row + 1 + lengths.index(longest))
        pictures = sum(len(value) for value in map(picture_bytes, values) if value is not None)
        inside = sum(_cost_inside(value) for value in values if not isinstance(value, str))
        return pictures + sum(lengths) + _CELL_BYTES * len(values) + inside

    def _values(self, column: Any, row: int, *, is_inner: bool = False) -> Sequence[Any]:
        """The cells of a column; `is_inner`: of a field of its records."""
        if pa.types.is_dictionary(column.type):
            return _distinct_once(column)
        if _is_list(column.type):
            return self._lists(column, row, is_inner=is_inner)
        if pa.types.is_struct(column.type):
            names = [field.name for field in column.type]
            parts = [self._values(part, row, is_inner=True) for part in column.flatten()]
            cells = [dict(zip(names, cells, strict=True)) for cells in zip(*parts, strict=True)]
            if is_inner:
                # A column's records all have the same fields: those that a record lacks are null in it.
                cells = [{name: each for name, each in cell.items() if each is not None} for cell in cells]
            return [cell if is_there else None for cell, is_there in zip(cells, column.is_valid(), strict=True)]
        if _is_time(column.type):
            return column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_pylist()  # type: ignore[no-any-return]
        if pa.types.is_decimal(column.type):
            return [None if value is None else float(value) for value in column.to_pylist()]
        return column.to_pylist()  # type: ignore[no-any-return]

    def _lists(self, column: Any, row: int, *, is_inner: bool) -> list[list[Any] | None]:
        lengths = pc.list_value_length(column).to_pylist()
        for place, length in enumerate(lengths):
            if (length or 0) > _LONGEST_LIST:
                message = f"a list of {length:,} values; at most {_LONGEST_LIST:,}; map the column with labels"
                raise DataError(message, file=self._file.name, line=row + place + 1)
        items = iter(self._values(column.flatten(), row, is_inner=is_inner))
        return [None if length is None else [next(items) for _ in range(length)] for length in lengths]


def picture_bytes(cell: Any) -> bytes | None:
    """The content of a picture's cell: bytes, or a struct with them; None for anything else."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _distinct_once(column: Any) -> list[Any]:
    """Values of a dictionary column: one Python object for each value used here, as the dictionary may be large."""
    used = column.indices.unique().drop_null()
    values = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
    return [None if index is None else values[index] for index in column.indices.to_pylist()]


def _undictionaried(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_plain(kind: Any) -> bool:
    types = pa.types
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(is_text or is_number or types.is_boolean(kind) or types.is_null(kind))


def _is_time(kind: Any) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_records(kind: Any, deepest: int = _DEEPEST_RECORDS) -> bool:
    """Whether a type is of records or lists, in each other to a depth, with plain values or times in them."""
    if not deepest:
        return False
    if _is_list(kind):
        inner = [kind.value_type]
    elif pa.types.is_struct(kind):
        inner = [field.type for field in kind]
    else:
        return False
    return all(
        _is_plain(each) or _is_time(each) or _is_records(each, deepest - 1) for each in map(_undictionaried, inner)
    )


def _is_nested(kind: Any) -> bool:
    return _is_list(kind) or pa.types.is_nested(kind)


def _class_names(feature: Any) -> tuple[str, ...]:
    """The class names of a `ClassLabel` feature, or of a sequence of them."""
    while isinstance(feature, dict | list):
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            return tuple(str(name) for name in feature.get("names", ()))
        feature = feature[0] if isinstance(feature, list) and feature else dict(feature).get("feature")
    return ()


def _cost_inside(value: Any) -> int:
    """Estimates the memory of a list's or record's items."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = _CELL_BYTES if isinstance(value, dict) else 8
    return own + sum(_cost_inside(item) for item in items)


def _is_picture(kind: Any) -> bool:
    types = pa.types
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_picture(kind.field(place).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_below(path: str, names: Sequence[str]) -> bool:
    """Whether a path such as `label.list.element` is of one of these columns."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
