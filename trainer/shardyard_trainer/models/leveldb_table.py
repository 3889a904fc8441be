"""Reads LevelDB's table format as TensorFlow writes the index of a checkpoint: sorted keys in uncompressed blocks.

The format (github.com/google/leveldb, doc/table_format.md): blocks, each followed by its kind of compression (a byte)
and its masked CRC-32C; at the end a footer of 48 bytes with the place of the block that lists the others. Everything is
bounded before it is believed: a file that is not such a table raises `TableInvalid`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import google_crc32c

MAX_BYTES = 64 * 1024 * 1024
"""Of a whole table. That of a checkpoint has some 100 bytes a tensor."""

MAX_ENTRIES = 100_000
_MAX_KEY = 1_024
_MAX_KEY_BYTES = 64 * 1024 * 1024
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5
_COMPRESSIONS = {1: "snappy", 2: "zstd"}
_MASK_DELTA = 0xA282EAD8


class TableInvalid(ValueError):
    """Bytes are not a table that is read; the message says why, without the file's name."""


def read_table(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The keys and values of a table, in its order. Raises TableInvalid."""
    if len(content) < _FOOTER:
        raise TableInvalid(f"it has {len(content):,} bytes, an index has at least {_FOOTER}")
    footer = content[-_FOOTER:]
    (magic,) = struct.unpack("<Q", footer[-8:])
    if magic != _MAGIC:
        raise TableInvalid("its last 8 bytes are not those of an index of TensorFlow; it is cut, or another file")
    at = _handle(footer, 0)[2]  # the block of meta data, which TensorFlow leaves empty
    offset, size, _ = _handle(footer, at)
    num_entries = num_key_bytes = 0
    for _, handle in _entries(_block(content, offset, size)):
        block = _block(content, *_handle(handle, 0)[:2])
        for key, value in _entries(block):
            num_entries, num_key_bytes = num_entries + 1, num_key_bytes + len(key)
            if num_entries > MAX_ENTRIES or num_key_bytes > _MAX_KEY_BYTES:
                raise TableInvalid(f"it has more than {MAX_ENTRIES:,} entries, or longer names than any model")
            try:
                yield key.decode(), value
            except UnicodeDecodeError:
                raise TableInvalid("it has a name that is not UTF-8") from None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends. Raises TableInvalid."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise TableInvalid("a number in it is cut")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at
    raise TableInvalid("a number in it is longer than 64 bits")


def has_checksum(content: bytes, masked: int) -> bool:
    """Whether bytes have the CRC-32C that LevelDB and TensorFlow store in a masked form."""
    crc: int = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF == masked


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """The offset and size of a block, and where they end."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return offset, size, at


def _block(content: bytes, offset: int, size: int) -> bytes:
    """The checked bytes of a block."""
    end = offset + size
    if end + _TRAILER > len(content) - _FOOTER:
        raise TableInvalid(f"a block from byte {offset:,} to {end:,} is outside of it; it is cut or damaged")
    kind = content[end]
    (crc,) = struct.unpack_from("<I", content, end + 1)
    if not has_checksum(content[offset : end + 1], crc):
        raise TableInvalid(f"the block at byte {offset:,} does not have its checksum; it is damaged")
    if kind:
        name = _COMPRESSIONS.get(kind, f"kind {kind}")
        raise TableInvalid(f"the block at byte {offset:,} is compressed ({name}), which TensorFlow does not do")
    return content[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block; a key repeats the first bytes of the one before it."""
    if len(block) < 4:
        raise TableInvalid("a block in it has no end")
    (num_restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * num_restarts
    if end < 0:
        raise TableInvalid("a block in it has more restarts than bytes")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        rest, at = varint(block, at)
        size, at = varint(block, at)
        if shared > len(key) or shared + rest > _MAX_KEY or at + rest + size > end:
            raise TableInvalid(f"an entry at byte {at:,} of a block is longer than the block, or its name than any")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + size]
        at += rest + size
