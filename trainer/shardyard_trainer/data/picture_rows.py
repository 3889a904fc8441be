"""Pictures with their labels from every layout: class folders, metadata.csv, Parquet, IDX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError, listed, shorten
from shardyard_trainer.data.idx import read_idx
from shardyard_trainer.data.parquet import picture_bytes
from shardyard_trainer.data.picture_folders import classes_of, is_metadata
from shardyard_trainer.data.pictures import MOST_BYTES
from shardyard_trainer.data.records import Record, Role, read_records
from shardyard_trainer.data.sources import DataFile, open_regular
from shardyard_trainer.reading import about, reading

_LABEL = Role("label", ("labels", "class", "category", "target", "fine_label", "coarse_label"))
NAMED = (Role("image", ("file_name", "filename", "file", "image_path", "path")), _LABEL)
HELD = (Role("image", ("img", "picture", "jpg", "png", "webp")), _LABEL)
_TABLES = frozenset({spec_pb2.DATA_FORMAT_PARQUET})


@dataclass(frozen=True)
class Picture:
    """One picture: file and line, the bytes of its file (or grey pixels, uint8 [H, W]), and its label as written."""

    file: str
    line: int
    content: bytes | np.ndarray
    label: Any


class _Found(NamedTuple):
    file: DataFile
    label: Any
    line: int
    said_in: str


def read_pictures(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, labels: Sequence[str], field: str
) -> Iterator[Picture]:
    """Yields the pictures of a source in order; `labels` names the classes of data that has numbers.

    Raises DataError, said of `field`.
    """
    about(field, "DATA_INVALID")
    kind = files[0].format
    try:
        if kind == spec_pb2.DATA_FORMAT_IMAGES:
            yield from _of_folder(files, source, labels, field)
        elif kind == spec_pb2.DATA_FORMAT_IDX:
            for file, line, pixels, number in read_idx(files):
                yield Picture(file, line, pixels, _named(number, labels, file, line))
        elif kind in _TABLES:
            yield from _of_tables(files, source, labels, field)
        else:
            text = (
                "not pictures; give a folder of pictures in class folders or with a metadata.csv, Parquet "
                "with an image column, or IDX files"
            )
            raise DataError(text, file=files[0].name)
    except DataError as error:
        raise (error if error.field.startswith(field) else error.at(field)) from None


def _of_folder(
    files: Sequence[DataFile], source: spec_pb2.DataSource, labels: Sequence[str], field: str
) -> Iterator[Picture]:
    pictures = [file for file in files if not is_metadata(file.name)]
    described = [file for file in files if is_metadata(file.name)]
    if not pictures:
        raise DataError("describes pictures, but its folder has none", file=files[0].name)
    if described:
        found = _described(pictures, described, source, labels, field)
    else:
        if source.columns:
            raise DataError("class folders have no columns; leave columns out, or give a metadata.csv", file="")
        classes = classes_of([file.name for file in pictures])
        found = [_Found(file, name, 0, file.name) for file, name in zip(pictures, classes, strict=True)]
    for file, label, line, said_in in found:
        reading(file.name)
        yield Picture(file.name if not line else said_in, line, _content(file), label)


def _described(
    pictures: Sequence[DataFile],
    described: Sequence[DataFile],
    source: spec_pb2.DataSource,
    labels: Sequence[str],
    field: str,
) -> list[_Found]:
    """Yields the pictures that rows of metadata name, in the order of the rows. Raises DataError."""
    by_name = {file.name: file for file in pictures}
    found: dict[str, _Found] = {}
    for table in described:
        folder = PurePosixPath(table.name).parent
        as_table = replace(table, format=_table_format(table.name))
        for record in read_records([as_table], source, (NAMED,), field=field):
            name = str(folder / str(record.cells["image"]).strip().removeprefix("./"))
            if name not in by_name:
                text = f"there is no picture {shorten(name)!r} in the folder; correct file_name, or remove the row"
                raise DataError(text, file=record.file, line=record.line)
            if name in found:
                text = f"{shorten(name)!r} has a row already, line {found[name].line}; give each picture one row"
                raise DataError(text, file=record.file, line=record.line)
            label = _label_of(record, labels)
            found[name] = _Found(by_name[name], label, record.line, record.file)
    if missing := [name for name in by_name if name not in found]:
        where = listed([table.name for table in described], most=3)
        text = (
            f"{len(missing):,} pictures have no row in {where}: {listed(missing, most=5)}; label them, or remove them"
        )
        raise DataError(text, file=missing[0])
    return list(found.values())


def _table_format(name: str) -> spec_pb2.DataFormat.ValueType:
    suffix = PurePosixPath(name.lower()).suffix
    known = {".csv": spec_pb2.DATA_FORMAT_CSV, ".tsv": spec_pb2.DATA_FORMAT_TSV}
    return known.get(suffix, spec_pb2.DATA_FORMAT_JSONL)


def _of_tables(
    files: Sequence[DataFile], source: spec_pb2.DataSource, labels: Sequence[str], field: str
) -> Iterator[Picture]:
    for record in read_records(files, source, (HELD,), field=field, has_pictures=True):
        content = picture_bytes(record.cells["image"])
        if content is None:
            cell = record.cells["image"]
            outside = isinstance(cell, dict) and cell.get("path")
            what = "names a file outside of the table" if outside or isinstance(cell, str) else "is empty"
            text = f"the picture {what}; save the table with the bytes of its pictures in it, or remove the row"
            raise DataError(text, file=record.file, line=record.line)
        yield Picture(record.file, record.line, content, _label_of(record, labels))


def _label_of(record: Record, labels: Sequence[str]) -> Any:
    # The file's own names come first: its numbers need not follow the spec's order of classes.
    label, names = record.cells["label"], record.names.get("label") or labels
    if isinstance(label, list):
        return [_named(each, names, record.file, record.line) for each in label]
    return _named(label, names, record.file, record.line)


def _named(label: Any, names: Sequence[str], file: str, line: int) -> Any:
    """The class name for a number if it is known; else the label as written."""
    if isinstance(label, str) and label.strip().isdecimal() and names and label.strip() not in names:
        label = int(label)
    if type(label) is not int or not names or str(label) in names:
        return label
    if not 0 <= label < len(names):
        text = f"the label {label:,}, but there are {len(names):,} classes, 0 to {len(names) - 1:,}; correct it"
        raise DataError(text, file=file, line=line)
    return names[label]


def _content(file: DataFile) -> bytes:
    with open_regular(file.path, file.name) as stream:
        try:
            content = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=file.name) from None
    return content
