"""Reads the tensors of a TensorFlow checkpoint (a TensorBundle) with NumPy alone.

`PREFIX.index` is a LevelDB table: the empty key holds a `BundleHeaderProto`, every other key is a tensor's name and
holds its `BundleEntryProto` (tensorflow/core/protobuf/tensor_bundle.proto). The values are in
`PREFIX.data-0000k-of-0000n`. Nothing here runs code of a file or allocates by its word: types, shapes, places and sizes
are compared with each other and with the files before a tensor is read, and its checksum afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.leveldb_table import MAX_BYTES, TableInvalid, has_checksum, read_table, varint

_AGAIN = "copy the checkpoint again, with all its files"
_MOST_SHARDS = 10_000
_MOST_DIMENSIONS = 16
_STRING = 7
_DTYPES: Mapping[int, str] = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 14: "bfloat16", 17: "<u2",
    19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip
"""NumPy's types by the numbers of tensorflow/core/framework/types.proto."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is. `dtype` is NumPy's, or `bfloat16`, `string`, or empty for a kind that no array has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    begin: int
    end: int
    crc: int
    is_sliced: bool

    @property
    def is_float(self) -> bool:
        """Whether its values can be weights."""
        return self.dtype in ("<f4", "<f8", "<f2", "bfloat16")


@dataclass(frozen=True)
class Bundle:
    """An opened checkpoint: its tensors by name, in the order of the index."""

    folder: Folder
    prefix: str
    num_shards: int
    entries: Mapping[str, Entry]

    @property
    def index(self) -> str:
        """The name of the file that lists the tensors."""
        return f"{self.prefix}.index"

    @property
    def files(self) -> list[str]:
        """The names of all its files."""
        return [self.index, *(self.shard_name(shard) for shard in range(self.num_shards))]

    def shard_name(self, shard: int) -> str:
        """The name of a file of values."""
        return f"{self.prefix}.data-{shard:05}-of-{self.num_shards:05}"

    def read(self, name: str) -> np.ndarray:
        """A tensor of floats as float32. Raises FolderInvalid for one that is damaged, or has no finite values."""
        entry = self.entries[name]
        if not entry.is_float or entry.is_sliced:
            kind = "is split into slices" if entry.is_sliced else f"has values of {entry.dtype or 'an unknown kind'}"
            raise self._wrong(entry, f"{kind}, where weights have whole tensors of floats; save the model again")
        with self.folder.open(self.shard_name(entry.shard)) as file:
            file.seek(entry.begin)
            content = file.read(entry.end - entry.begin)
        if len(content) != entry.end - entry.begin or not has_checksum(content, entry.crc):
            raise self._wrong(entry, f"does not have its checksum: the file is damaged; {_AGAIN}")
        values = _floats(content, entry.dtype).reshape(entry.shape)
        if not np.isfinite(values).all():
            raise self._wrong(
                entry,
                "has values that are not finite (NaN, infinite, or too large for 32 bits); take a checkpoint from "
                "before it diverged",
            )
        return values

    def _wrong(self, entry: Entry, what: str) -> FolderInvalid:
        file = self.shard_name(entry.shard)
        return FolderInvalid(f"tensor {shorten(entry.name)!r} of {file} {what}", file=file, tensor=entry.name)


def open_bundle(folder: Folder, prefix: str) -> Bundle:
    """The checkpoint of a prefix, such as `bert_model.ckpt`, its files looked at. Raises FolderInvalid."""
    index = f"{prefix}.index"
    content = folder.read(index, most_bytes=MAX_BYTES)
    try:
        bundle = _parsed(folder, prefix, content)
    except TableInvalid as error:
        raise FolderInvalid(f"{index} is not the index of a checkpoint: {error}; {_AGAIN}", file=index) from None
    sizes = {shard: _size_of(bundle, shard) for shard in range(bundle.num_shards)}
    _check_places(bundle, sizes)
    return bundle


def _parsed(folder: Folder, prefix: str, content: bytes) -> Bundle:
    entries: dict[str, Entry] = {}
    num_shards = 0
    for name, value in read_table(content):
        if not name:
            num_shards = _num_shards(value)
        elif name in entries:
            raise TableInvalid(f"it has the tensor {shorten(name)!r} twice")
        elif not num_shards:
            raise TableInvalid("it does not begin with its header")
        else:
            entries[name] = _entry(name, value, num_shards)
    if not num_shards:
        raise TableInvalid("it is empty")
    return Bundle(folder, prefix, num_shards, entries)


def _num_shards(value: bytes) -> int:
    header = dict(_fields(value))
    if header.get(2, 0) != 0:
        raise TableInvalid("it was written by a machine of another byte order; save it again on an ordinary one")
    number = header.get(1, 0)
    if not isinstance(number, int) or not 1 <= number <= _MOST_SHARDS:
        raise TableInvalid(f"it announces {shorten(str(number))} files of values; 1 to {_MOST_SHARDS:,} are read")
    return number


def _entry(name: str, value: bytes, num_shards: int) -> Entry:
    found = Entry(name, "", (), 0, 0, 0, 0, is_sliced=False)
    size = 0
    for number, part in _fields(value):
        if number == 7:
            found = replace(found, is_sliced=True)
        elif number == 2:
            found = replace(found, shape=_shape(name, part))
        elif not isinstance(part, int):
            raise TableInvalid(f"the entry of {shorten(name)!r} has a field {number} of another kind")
        elif number == 1:
            found = replace(found, dtype="string" if part == _STRING else _DTYPES.get(part, ""))
        elif number == 3:
            found = replace(found, shard=part)
        elif number == 4:
            found = replace(found, begin=part)
        elif number == 5:
            size = part
        elif number == 6:
            found = replace(found, crc=part)
    if found.shard >= num_shards:
        raise TableInvalid(f"{shorten(name)!r} is in file {found.shard:,} of {num_shards:,}")
    needed = math.prod(found.shape) * _item_bytes(found.dtype)  # Python integers do not overflow
    if found.dtype not in ("", "string") and not found.is_sliced and needed != size:
        raise TableInvalid(f"{shorten(name)!r} has the shape {list(found.shape)}, {needed:,} bytes, but {size:,} of it")
    return replace(found, end=found.begin + size)


def _shape(name: str, value: Any) -> tuple[int, ...]:
    """The sizes in a TensorShapeProto: field 2 is a dimension, whose field 1 is its size."""
    if not isinstance(value, bytes):
        raise TableInvalid(f"the entry of {shorten(name)!r} has no shape")
    sizes = [
        dict(_fields(part)).get(1, 0) for number, part in _fields(value) if number == 2 and isinstance(part, bytes)
    ]
    if len(sizes) > _MOST_DIMENSIONS or not all(isinstance(size, int) and size < 2**40 for size in sizes):
        raise TableInvalid(f"{shorten(name)!r} has the shape {shorten(str(sizes))}, which no tensor has")
    return tuple(int(size) for size in sizes)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The numbered fields of a protobuf message: whole numbers, or the bytes of what else there is."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise TableInvalid("a message in it cannot be parsed")
        if at + size > len(message):
            raise TableInvalid("a message in it is cut")
        part = message[at : at + size]
        at += size
        yield tag >> 3, part if kind == 2 else int.from_bytes(part, "little")


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize if dtype not in ("", "string") else 0


def _size_of(bundle: Bundle, shard: int) -> int:
    name = bundle.shard_name(shard)
    if not bundle.folder.has(name):
        raise FolderInvalid(
            f"{bundle.index} says that the checkpoint has {bundle.num_shards:,} files of values, but {name} is "
            "missing; put it beside the index",
            file=name,
        )
    with bundle.folder.open(name) as file:
        return file.seek(0, 2)


def _check_places(bundle: Bundle, sizes: Mapping[int, int]) -> None:
    """Raises FolderInvalid for a tensor outside its file, or in the place of another one."""
    before: Entry | None = None
    for entry in sorted(bundle.entries.values(), key=lambda each: (each.shard, each.begin, each.end)):
        if entry.is_sliced:
            continue  # Its slices have entries of their own.
        name, size = bundle.shard_name(entry.shard), sizes[entry.shard]
        where = f"tensor {shorten(entry.name)!r} is at bytes {entry.begin:,} to {entry.end:,} of {name}"
        if entry.end > size:
            raise FolderInvalid(f"{where}, which has {size:,}: it is cut; {_AGAIN}", file=name, tensor=entry.name)
        if before is not None and before.shard == entry.shard and entry.begin < before.end:
            raise FolderInvalid(
                f"{where}, where {shorten(before.name)!r} is too: the index is damaged; {_AGAIN}",
                file=bundle.index,
                tensor=entry.name,
            )
        before = entry


def _floats(content: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        # The upper half of a float32.
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.frombuffer(content, dtype).astype(np.float32)
