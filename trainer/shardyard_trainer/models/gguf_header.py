"""Walks through the header of a GGUF file before any library reads it, so that none of its numbers is believed.

The format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, numbers of tensors and of settings; the settings,
each a name, a kind and a value; the tensors, each a name, its sizes, its kind and its place; then the values, aligned.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from shardyard_trainer.data.errors import shorten

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_TENSORS = 50_000
_MOST_SETTINGS = 10_000
_MOST_ITEMS = 10_000_000
_MOST_TEXT = 16 * 1024 * 1024
_MOST_DIMENSIONS = 8
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the scalar kinds of settings."""


class HeaderInvalid(ValueError):
    """A header is not one that is read; the message says why, without the file's name."""


@dataclass(frozen=True)
class Header:
    """What a file says that it has: the architecture, and the number of weights."""

    architecture: str
    num_weights: int


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
    architecture, alignment = "", 32
    for _ in range(num_settings):
        name, value = walk.text(), walk.value()
        if name == "general.architecture" and isinstance(value, str):
            architecture = value
        elif name == "general.alignment" and isinstance(value, int):
            alignment = value
    if not architecture:
        raise HeaderInvalid("it has no general.architecture")
    if alignment < 8 or alignment & (alignment - 1) or alignment > 2**20:
        raise HeaderInvalid(f"it has the alignment {alignment:,}, which is not a power of two")
    tensors = [walk.tensor(blocks) for _ in range(num_tensors)]
    start = -(-walk.at // alignment) * alignment
    for name, _, offset, length in tensors:
        if start + offset + length > size:
            raise HeaderInvalid(
                f"the tensor {shorten(name)!r} ends at byte {start + offset + length:,}, but it has {size:,}: it is cut"
            )
    return Header(architecture, sum(number for _, number, _, _ in tensors))


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

    def value(self) -> object:
        """The value of a setting: a text, a whole number of 32 bits, or None for all others."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            self._skip_array()
            return None
        if kind == 4:
            return self.number("<I")
        if kind not in _SIZES:
            raise HeaderInvalid(f"it has a setting of the unknown kind {kind:,}")
        self.take(_SIZES[kind])
        return None

    def _skip_array(self) -> None:
        kind, number = self.number("<I"), self.number("<Q")
        self._items += number
        if self._items > _MOST_ITEMS:
            raise HeaderInvalid(f"its lists have more than {_MOST_ITEMS:,} items")
        if kind == _STRING:
            for _ in range(number):
                self.take(self.number("<Q"))
        elif kind in _SIZES:
            self.take(_SIZES[kind] * number)
        else:
            raise HeaderInvalid(f"it has a list of the kind {kind:,}, which is not read")

    def tensor(self, blocks: Mapping[int, tuple[int, int]]) -> tuple[str, int, int, int]:
        """A tensor's name, its number of weights, its place and its bytes."""
        name = self.text()
        dimensions = self.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} has {dimensions:,} dimensions")
        number = math.prod(self.number("<Q") for _ in range(dimensions))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in blocks:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} is quantised in the unknown way {kind:,}")
        of_block, block_bytes = blocks[kind]
        if number % of_block:
            raise HeaderInvalid(f"the tensor {shorten(name)!r} has {number:,} weights, not whole blocks of {of_block}")
        return name, number, offset, number // of_block * block_bytes
