"""IDX files, in which MNIST and its like come: a pair of files, one of pictures and one of labels.

The format (LeCun and others, 1998): two zero bytes, the type, the number of dimensions, each as 4 bytes big-endian,
then the values.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from shardyard_trainer.data.containers import open_packed
from shardyard_trainer.data.errors import DataError, listed
from shardyard_trainer.data.sources import DataFile, partner

_UNSIGNED_BYTE = 8
_PICTURES = re.compile(r"(images|idx3)", re.IGNORECASE)
_MOST_SIDE = 4096


def read_idx(files: Sequence[DataFile]) -> Iterator[tuple[str, int, np.ndarray, int]]:
    """(file, number from 1, pixels uint8 [H, W], label) of every picture, pair after pair. Raises DataError."""
    for pictures, labels in _pairs(files):
        with open_packed(pictures) as stream, open_packed(labels) as label_stream:
            count, height, width = _of_pictures(stream, pictures)
            (number,) = _of_labels(label_stream, labels)
            if number != count:
                text = f"{count:,} pictures, but {labels.name} has {number:,} labels; give files that belong together"
                raise DataError(text, file=pictures.name)
            for at in range(count):
                pixels = np.frombuffer(_exactly(stream, height * width, pictures, at), np.uint8)
                label = _exactly(label_stream, 1, labels, at)[0]
                yield pictures.name, at + 1, pixels.reshape(height, width), label
            for each, opened in ((pictures, stream), (labels, label_stream)):
                _check_end(opened, each, count)


def read_idx_pictures(files: Sequence[DataFile]) -> Iterator[tuple[str, int, np.ndarray]]:
    """(file, number from 1, pixels uint8 [H, W]) of every picture; labels are not looked at. Raises DataError."""
    for file in _with_pictures(files):
        with open_packed(file) as stream:
            count, height, width = _of_pictures(stream, file)
            for at in range(count):
                pixels = np.frombuffer(_exactly(stream, height * width, file, at), np.uint8)
                yield file.name, at + 1, pixels.reshape(height, width)
            _check_end(stream, file, count)


def _with_pictures(files: Sequence[DataFile]) -> list[DataFile]:
    pictures = [file for file in files if _PICTURES.search(file.name)]
    if not pictures:
        text = "labels without pictures; give the file of pictures too, such as train-images-idx3-ubyte"
        raise DataError(text, file=files[0].name)
    return pictures


def _pairs(files: Sequence[DataFile]) -> list[tuple[DataFile, DataFile]]:
    by_name = {file.name.removesuffix(".gz"): file for file in files}
    found = []
    for file in _with_pictures(files):
        labels = by_name.get(partner(file.name.removesuffix(".gz")))
        if labels is None or labels is file:
            there = listed([each.name for each in files], most=6)
            text = f"the folder has no {partner(file.name)} with its labels; there are: {there}"
            raise DataError(text, file=file.name)
        found.append((file, labels))
    return found


def _of_pictures(stream: BinaryIO, file: DataFile) -> tuple[int, int, int]:
    shape = _header(stream, file)
    if len(shape) != 3:
        text = f"{len(shape)} dimensions; pictures have 3: their number, height and width"
        raise DataError(text, file=file.name)
    count, height, width = shape
    if not (0 < height <= _MOST_SIDE and 0 < width <= _MOST_SIDE):
        text = f"pictures of {height:,} × {width:,} pixels; at most {_MOST_SIDE:,} each way"
        raise DataError(text, file=file.name)
    return count, height, width


def _of_labels(stream: BinaryIO, file: DataFile) -> tuple[int]:
    shape = _header(stream, file)
    if len(shape) != 1:
        raise DataError(f"{len(shape)} dimensions; labels have 1, their number", file=file.name)
    return (shape[0],)


def _header(stream: BinaryIO, file: DataFile) -> tuple[int, ...]:
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or not 1 <= start[3] <= 4:
        raise DataError(
            "not an IDX file: it does not begin with its type and dimensions; copy it again", file=file.name
        )
    if start[2] != _UNSIGNED_BYTE:
        text = f"values of the type 0x{start[2]:02x}; pictures and labels are read as unsigned bytes (0x08)"
        raise DataError(text, file=file.name)
    sizes = stream.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise DataError("the file is cut short in its header; copy it again", file=file.name)
    shape: tuple[int, ...] = struct.unpack(f">{start[3]}I", sizes)
    if not shape[0]:
        raise DataError("the file has no entries", file=file.name)
    return shape


def _exactly(stream: BinaryIO, size: int, file: DataFile, at: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise DataError(f"the file ends in entry {at + 1:,}; copy it again", file=file.name)
    return content


def _check_end(stream: BinaryIO, file: DataFile, count: int) -> None:
    if stream.read(1):
        raise DataError(f"continues after its {count:,} entries; copy it again", file=file.name)
