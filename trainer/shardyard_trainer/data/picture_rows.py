"""Pictures with their labels from every layout: class folders, metadata.csv, Parquet, IDX."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, listed, shorten
from shardyard_trainer.data.idx import read_idx, read_idx_pictures
from shardyard_trainer.data.parquet import picture_bytes
from shardyard_trainer.data.picture_folders import classes_of, is_metadata
from shardyard_trainer.data.pictures import MOST_BYTES
from shardyard_trainer.data.records import Record, Role, read_records
from shardyard_trainer.data.sources import DataFile, open_regular
from shardyard_trainer.reading import about, reading

_LABEL = Role("label", ("labels", "class", "cls", "category", "target", "fine_label", "coarse_label"))
NAMED = (Role("image", ("file_name", "filename", "file", "image_path", "path")), _LABEL)
HELD = (Role("image", ("img", "picture", "jpg", "png", "webp")), _LABEL)
_TABLES = frozenset({spec_pb2.DATA_FORMAT_PARQUET})


@dataclass(frozen=True)
class Picture:
    """One picture: file and line for errors, its own name, the bytes of its file, and its label as written.

    `content` may also be grey pixels, uint8 [H, W].
    """

    file: str
    line: int
    name: str
    content: bytes | np.ndarray
    label: Any = None


class _Found(NamedTuple):
    file: DataFile
    label: Any
    line: int
    said_in: str


def read_pictures(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    *,
    labels: Sequence[str] | None,
    field: str,
    bad: BadRows | None = None,
) -> Iterator[Picture]:
    """Yields the pictures of a source in order.

    `labels` names the classes of data that has numbers; None: no labels are read. Pictures that cannot be used go to
    `bad`, if the caller has one and finishes it. Raises DataError for `field`.
    """
    about(field, "DATA_INVALID")
    kind, own, num_rows = files[0].format, bad or BadRows(source), 0
    try:
        if kind == spec_pb2.DATA_FORMAT_IMAGES:
            found = _of_folder(files, source, labels, own, field)
        elif kind == spec_pb2.DATA_FORMAT_IDX:
            found = _of_idx(files, labels, own)
        elif kind in _TABLES:
            found = _of_tables(files, source, labels, own, field)
        else:
            text = (
                "not pictures; give a folder of pictures in class folders or with a metadata.csv, Parquet "
                "with an image column, or IDX files"
            )
            raise DataError(text, file=files[0].name)
        for picture in found:
            num_rows += 1
            yield picture
        if bad is None:
            own.finish(num_rows, field)
    except DataError as error:
        raise (error if error.field.startswith(field) else error.at(field)) from None


def _of_folder(
    files: Sequence[DataFile], source: spec_pb2.DataSource, labels: Sequence[str] | None, bad: BadRows, field: str
) -> Iterator[Picture]:
    pictures = [file for file in files if not is_metadata(file.name)]
    described = [file for file in files if is_metadata(file.name)]
    if not pictures:
        raise DataError("describes pictures, but its folder has none", file=files[0].name)
    if labels is None:
        if source.columns:
            raise DataError("every picture of a folder is read, whatever describes it; leave columns out", file="")
        found = [_Found(file, None, 0, file.name) for file in pictures]
    elif described:
        found = _described(pictures, described, source, labels, field=field, bad=bad)
    else:
        if source.columns:
            raise DataError("class folders have no columns; leave columns out, or give a metadata.csv", file="")
        classes = classes_of([file.name for file in pictures])
        found = [_Found(file, name, 0, file.name) for file, name in zip(pictures, classes, strict=True)]
    for file, label, line, said_in in found:
        reading(file.name)
        try:
            content = _content(file)
        except DataError as error:
            bad.skip_file(error)
            continue
        yield Picture(file.name if not line else said_in, line, file.name, content, label)


def _described(
    pictures: Sequence[DataFile],
    described: Sequence[DataFile],
    source: spec_pb2.DataSource,
    labels: Sequence[str],
    *,
    field: str,
    bad: BadRows,
) -> list[_Found]:
    """Yields the pictures that rows of metadata name, in the order of the rows. Raises DataError."""
    by_name = {_plain(file.name): file for file in pictures}
    found: dict[str, _Found] = {}
    named: set[str] = set()
    for table in described:
        folder = PurePosixPath(table.name).parent
        as_table = replace(table, format=_table_format(table.name))
        for record in read_records([as_table], source, (NAMED,), field=field, bad=bad):
            name = _plain(str(folder / _plain(str(record.cells["image"])).removeprefix("./")))
            named.add(name)
            try:
                _check_row(name, record, by_name, found)
                label = _label_of(record, labels)
            except DataError as error:
                bad.skip(error)
                continue
            found[name] = _Found(by_name[name], label, record.line, record.file)
    where = listed([table.name for table in described], most=3)
    if missing := [name for name in by_name if name not in named]:
        text = f"no row in {where}; label it, or remove it"
        for name in missing if source.max_bad_rows_share else ():
            bad.skip_file(DataError(text, file=name))
        if not source.max_bad_rows_share:
            names = listed(missing, most=5)
            text = f"{len(missing):,} pictures have no row in {where}: {names}; label them, or remove them"
            raise DataError(text, file=missing[0])
    return list(found.values())


def _plain(name: str) -> str:
    """A path as it is compared: Windows writes its folders with backslashes, and macOS its accents apart."""
    return unicodedata.normalize("NFC", name.strip()).replace("\\", "/")


def _check_row(name: str, record: Record, by_name: Mapping[str, DataFile], found: Mapping[str, _Found]) -> None:
    """Raises DataError for a row of metadata that names no picture, or one that has a row."""
    if name not in by_name:
        text = f"there is no picture {shorten(name)!r} in the folder; correct file_name, or remove the row"
        raise DataError(text, file=record.file, line=record.line)
    if name in found:
        text = f"{shorten(name)!r} has a row already, line {found[name].line}; give each picture one row"
        raise DataError(text, file=record.file, line=record.line)


def _of_idx(files: Sequence[DataFile], labels: Sequence[str] | None, bad: BadRows) -> Iterator[Picture]:
    if labels is None:
        for file, line, pixels in read_idx_pictures(files):
            yield Picture(file, line, _numbered(file, line), pixels)
        return
    for file, line, pixels, number in read_idx(files):
        try:
            label = _named(number, labels, file, line)
        except DataError as error:
            bad.skip(error)
            continue
        yield Picture(file, line, _numbered(file, line), pixels, label)


def _numbered(file: str, line: int) -> str:
    return f"{file}:{line}"


def _table_format(name: str) -> spec_pb2.DataFormat.ValueType:
    suffix = PurePosixPath(name.lower()).suffix
    known = {".csv": spec_pb2.DATA_FORMAT_CSV, ".tsv": spec_pb2.DATA_FORMAT_TSV}
    return known.get(suffix, spec_pb2.DATA_FORMAT_JSONL)


def _of_tables(
    files: Sequence[DataFile], source: spec_pb2.DataSource, labels: Sequence[str] | None, bad: BadRows, field: str
) -> Iterator[Picture]:
    layout = HELD if labels is not None else HELD[:1]
    for record in read_records(files, source, (layout,), field=field, bad=bad, has_pictures=True):
        cell = record.cells["image"]
        outside = cell.get("path") if isinstance(cell, dict) else ""
        try:
            content = picture_bytes(cell)
            if content is None:
                what = "names a file outside of the table" if outside or isinstance(cell, str) else "is empty"
                text = f"the picture {what}; save the table with the bytes of its pictures in it, or remove the row"
                raise DataError(text, file=record.file, line=record.line)
            label = _label_of(record, labels) if labels is not None else None
        except DataError as error:
            bad.skip(error)
            continue
        name = outside if isinstance(outside, str) and outside else _numbered(record.file, record.line)
        yield Picture(record.file, record.line, name, content, label)


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
