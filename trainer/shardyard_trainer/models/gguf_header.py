"""Walks through the header of a GGUF file before any library reads it, so that none of its numbers is believed.

The format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, numbers of tensors and of settings; the settings,
each a name, a kind and a value; the tensors, each a name, its sizes, its kind and its place; then the values, aligned.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, TypeVar

from shardyard_trainer.data.errors import shorten

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_TENSORS = 50_000
_MOST_SETTINGS = 10_000
_MOST_ITEMS = 10_000_000
_MOST_TEXT = 16 * 1024 * 1024
_MOST_DIMENSIONS = 8
_MOST_KEPT = 4096
"""Characters of a text, or items of a list, that are remembered; longer ones are vocabularies and templates."""

_STRING, _ARRAY = 8, 9
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The scalar kinds of settings, as `struct` calls them."""

_T = TypeVar("_T")
Value = str | int | float | bool | tuple[int | float | bool, ...] | None
"""What a setting says; None: it is too long to be remembered, or a list of texts."""


class HeaderInvalid(ValueError):
    """A header is not one that is read; the message says why, without the file's name."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape as PyTorch has it, its kind, and where its values begin."""

    shape: tuple[int, ...]
    kind: int
    place: int


@dataclass(frozen=True)
class Header:
    """What a file says that it has: the architecture, the number of weights, all settings and all tensors by name."""

    architecture: str
    num_weights: int
    settings: Mapping[str, Value] = field(default_factory=dict)
    tensors: Mapping[str, Stored] = field(default_factory=dict)

    def own(self) -> dict[str, Value]:
        """The settings of the architecture, without its name before theirs."""
        start = f"{self.architecture}."
        return {name.removeprefix(start): value for name, value in self.settings.items() if name.startswith(start)}

    def numbers(self, file: BinaryIO, name: str) -> list[float]:
        """The values of a short tensor of 32 bits, such as the factors of a rotation. Raises HeaderInvalid."""
        stored = self.tensors[name]
        number = math.prod(stored.shape)
        if stored.kind != 0 or number > _MOST_KEPT:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} is not a short one of 32 bits")
        file.seek(stored.place)
        return list(struct.unpack(f"<{number}f", file.read(4 * number)))


def read_header(file: BinaryIO, blocks: Mapping[int, tuple[int, int]]) -> Header:
    """Reads the header; `blocks` are the weights in a block and its bytes, of each kind. Raises HeaderInvalid."""
    size = file.seek(0, 2)
    file.seek(0)
    walk = _Walk(file, size)
    if walk.take(4) != _MAGIC:
        raise HeaderInvalid("it does not begin as a GGUF file")
    version = walk.number("<I")
    if version not in _VERSIONS:
        raise HeaderInvalid(f"it is of version {version:,}; {' and '.join(map(str, _VERSIONS))} are read")
    num_tensors, num_settings = walk.number("<Q"), walk.number("<Q")
    if num_tensors > _MOST_TENSORS or num_settings > _MOST_SETTINGS:
        raise HeaderInvalid(f"it announces {num_tensors:,} tensors and {num_settings:,} settings, more than any model")
    settings = _named("setting", [(walk.text(), walk.value()) for _ in range(num_settings)])
    architecture, alignment = settings.get("general.architecture"), settings.get("general.alignment", 32)
    if not isinstance(architecture, str) or not architecture:
        raise HeaderInvalid("it has no general.architecture")
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise HeaderInvalid(f"it has the alignment {shorten(str(alignment))}, which is not a power of two")
    entries = [walk.tensor(blocks) for _ in range(num_tensors)]
    start = -(-walk.at // alignment) * alignment
    for entry in entries:
        if (end := start + entry.offset + entry.length) > size:
            raise HeaderInvalid(
                f"the tensor {shorten(entry.name)!r} ends at byte {end:,}, but it has {size:,}: it is cut"
            )
    tensors = [(entry.name, Stored(entry.shape, entry.kind, start + entry.offset)) for entry in entries]
    num_weights = sum(math.prod(entry.shape) for entry in entries)
    return Header(architecture, num_weights, settings, _named("tensor", tensors))


def _named(what: str, pairs: list[tuple[str, _T]]) -> dict[str, _T]:
    """The pairs by name. Raises HeaderInvalid for a name that is there twice: readers differ in which they take."""
    found: dict[str, _T] = {}
    for name, value in pairs:
        if name in found:
            raise HeaderInvalid(f"it has the {what} {shorten(name)!r} twice")
        found[name] = value
    return found


class _Entry(NamedTuple):
    """A tensor as the header lists it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    length: int


class _Walk:
    """Reads one thing after the other, and never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._items = 0
        self.at = 0

    def take(self, number: int) -> bytes:
        """So many bytes."""
        if self.at + number > self._size:
            raise HeaderInvalid(f"its header ends at byte {self._size:,}, in the middle of something: it is cut")
        self.at += number
        return self._file.read(number)

    def number(self, layout: str) -> int:
        """A whole number."""
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def text(self) -> str:
        """A text with its length before it."""
        length = self.number("<Q")
        if length > _MOST_TEXT:
            raise HeaderInvalid(f"it has a text of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise HeaderInvalid("it has a text that is not UTF-8") from None

    def value(self) -> Value:
        """The value of a setting."""
        kind = self.number("<I")
        if kind == _STRING:
            found = self.text()
            return found if len(found) <= _MOST_KEPT else None
        if kind == _ARRAY:
            return self._list()
        if kind not in _LAYOUTS:
            raise HeaderInvalid(f"it has a setting of the unknown kind {kind:,}")
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, number: int) -> tuple[int | float | bool, ...]:
        layout = f"<{number}{_LAYOUTS[kind]}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def _list(self) -> Value:
        kind, number = self.number("<I"), self.number("<Q")
        self._items += number
        if self._items > _MOST_ITEMS:
            raise HeaderInvalid(f"its lists have more than {_MOST_ITEMS:,} items")
        if kind == _STRING:
            for _ in range(number):
                self.take(self.number("<Q"))
        elif kind not in _LAYOUTS:
            raise HeaderInvalid(f"it has a list of the kind {kind:,}, which is not read")
        elif number <= _MOST_KEPT:
            return self._numbers(kind, number)
        else:
            self.take(struct.calcsize(f"<{_LAYOUTS[kind]}") * number)
        return None

    def tensor(self, blocks: Mapping[int, tuple[int, int]]) -> _Entry:
        """The next tensor."""
        name = self.text()
        dimensions = self.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} has {dimensions:,} dimensions")
        # GGUF has the sizes in the other order.
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in blocks:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} is quantised in the unknown way {kind:,}")
        of_block, block_bytes = blocks[kind]
        number = math.prod(shape)
        if number % of_block:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} has {number:,} weights, not whole blocks of {of_block}")
        return _Entry(name, shape, kind, offset, number // of_block * block_bytes)
