"""Decoded sizes from the page headers of a Parquet file, read before a page is unpacked; the footer is not trusted.

A page header is a Thrift struct in the compact protocol (parquet-format, `PageHeader`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

_WINDOW = 2**14
_LONGEST_HEADER = 2**24
_DEEPEST = 16
# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8


class PageInvalid(Exception):
    """The bytes are not a page header."""


class Page(NamedTuple):
    """What one page decodes to: bytes, and values (0 for a dictionary, whose values are not rows)."""

    num_bytes: int
    num_values: int


def read_pages(stream: BinaryIO, start: int, size: int) -> Iterator[Page]:
    """The pages of a column chunk of `size` bytes at `start`. Raises PageInvalid."""
    at, end = start, start + size
    while at < end:
        header, length = _header(stream, at, end)
        unpacked, packed = header.get(2), header.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or unpacked < 0 or packed < 0:
            raise PageInvalid("a page without sizes")
        num_values = _number_in(header, _DATA) or _number_in(header, _DATA_V2)
        yield Page(unpacked + 8 * _number_in(header, _DICTIONARY), num_values)
        at += length + packed


def _number_in(header: dict[int, Any], field: int) -> int:
    """The number of values, the first field of each part of a page header; 0 if the part is missing."""
    part = header.get(field, {})
    number = part.get(1, 0) if isinstance(part, dict) else None
    if not isinstance(number, int) or number < 0:
        raise PageInvalid("a page without a number of values")
    return number


def _header(stream: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int]:
    window = _WINDOW
    while True:
        stream.seek(at)
        raw = stream.read(min(window, end - at))
        reader = _Compact(raw)
        try:
            return reader.struct(0), reader.at
        except IndexError:
            # Statistics of long texts make headers long.
            if len(raw) < window or window >= _LONGEST_HEADER:
                raise PageInvalid("a page header that does not end") from None
            window *= 16


class _Compact:
    """Reads Thrift's compact protocol. Raises IndexError at the end of the bytes, PageInvalid for other bytes."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.at = 0

    def struct(self, depth: int) -> dict[int, Any]:
        """Reads a struct as field id → value; skips texts, refuses lists."""
        if depth > _DEEPEST:
            raise PageInvalid("a page header nested too deeply")
        found: dict[int, Any] = {}
        field = 0
        while byte := self._byte():
            kind = byte & 0x0F
            field = field + (byte >> 4) if byte >> 4 else self._zigzag()
            found[field] = self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in _INTEGERS:
            return self._zigzag()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind == _BINARY:
            self._pass(self._varint())
        elif kind == _BYTE:
            self._pass(1)
        elif kind == _DOUBLE:
            self._pass(8)
        else:
            # The headers of pages have no lists and maps.
            raise PageInvalid(f"a page header with a value of kind {kind}")
        return None

    def _byte(self) -> int:
        byte = self._raw[self.at]
        self.at += 1
        return byte

    def _pass(self, size: int) -> None:
        self.at += size
        if self.at > len(self._raw):
            raise IndexError

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
        raise PageInvalid("a number that does not end")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
