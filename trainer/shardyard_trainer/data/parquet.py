"""Rows of a Parquet file in flat memory, whatever the file claims to decode to."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.lines import LONGEST_LINE_BYTES
from shardyard_trainer.data.sources import DataFile, open_regular

# A file of a few megabytes can decode to terabytes (one dictionary value repeated): what a file may decode to is bound.
_LARGEST_RATIO = 200
_ALWAYS_ALLOWED_BYTES = 256 * 2**20
_BATCH_ROWS = 512


def read_parquet(
    file: DataFile, most_columns: int, *, needed: Container[str] = ()
) -> tuple[tuple[str, ...], Iterator[tuple[int, Sequence[Any]]]]:
    """A file's column names, and its rows as (row from 1, cells). Raises DataError, also from the iterator.

    Columns of records are left out; one of a `needed` name is refused.
    """
    stream = open_regular(file.path, file.name)
    try:
        opened = pq.ParquetFile(stream)
        names = opened.schema_arrow.names
        # Kept as a dictionary, a repeated value is in memory once.
        strings = [field.name for field in opened.schema_arrow if _is_text(field.type)]
        opened = pq.ParquetFile(stream, read_dictionary=strings)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"not a Parquet file that can be read: {_first_line(error)}", file=file.name) from None
    if opened.metadata.num_rows == 0:
        raise DataError("the file has no rows", file=file.name)
    if len(names) > most_columns:
        raise DataError(f"{len(names):,} columns; at most {most_columns:,}", file=file.name)
    flat = [field.name for field in opened.schema_arrow if _is_flat(file, field, needed)]
    if not flat:
        raise DataError("all columns are records; text and labels are strings, numbers or lists", file=file.name)
    return tuple(flat), _rows(file, opened, flat if len(flat) < len(names) else None)


def _rows(file: DataFile, opened: Any, columns: list[str] | None) -> Iterator[tuple[int, Sequence[Any]]]:
    size = file.path.stat().st_size
    allowed = max(_ALWAYS_ALLOWED_BYTES, _LARGEST_RATIO * size)
    declared = sum(opened.metadata.row_group(i).total_byte_size for i in range(opened.metadata.num_row_groups))
    row = decoded = 0
    if declared > allowed:
        raise DataError(f"decodes to {declared:,} bytes; for its size at most {allowed:,}", file=file.name)
    try:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for cells in zip(*(_values(column) for column in batch.columns), strict=True):
                row += 1
                for cell in cells:
                    length = len(cell) if isinstance(cell, str) else 8
                    decoded += length
                    if length > LONGEST_LINE_BYTES:
                        raise DataError(f"a value of {length:,} characters; at most 16 MiB", file=file.name, line=row)
                if decoded > allowed:
                    raise DataError(
                        f"decodes to more than {allowed:,} bytes, over {_LARGEST_RATIO} times its size", file=file.name
                    )
                yield row, cells
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"damaged after row {row:,}: {_first_line(error)}", file=file.name) from None


def _values(column: Any) -> Iterator[Any]:
    if pa.types.is_dictionary(column.type):
        # One Python string a distinct value; a row only points at it.
        values = column.dictionary.to_pylist()
        return (None if index is None else values[index] for index in column.indices.to_pylist())
    if pa.types.is_decimal(column.type):
        return (None if value is None else float(value) for value in column.to_pylist())
    return iter(column.to_pylist())


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_flat(file: DataFile, field: Any, needed: Container[str]) -> bool:
    kind = field.type
    if not (pa.types.is_struct(kind) or pa.types.is_map(kind) or pa.types.is_union(kind)):
        return True
    if field.name in needed:
        raise DataError(
            f"column {field.name!r} is {kind}; text and labels are strings, numbers or lists of them",
            file=file.name,
            column=field.name,
        )
    return False


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
