"""TensorFlow checkpoints written by hand, byte by byte, so that each part can be spoiled."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import google_crc32c
import numpy as np

MAGIC = 0xDB4775248B80FB57


@dataclass(frozen=True)
class Part:
    """A tensor's entry in the index, and its bytes; `extra` is more of the entry's message."""

    dtype: int
    shape: tuple[int, ...]
    content: bytes
    offset: int | None = None
    size: int | None = None
    crc: int | None = None
    shard: int = 0
    extra: bytes = b""


def floats(*shape: int, seed: int = 0) -> Part:
    """A tensor of random float32."""
    return Part(1, shape, np.random.default_rng(seed).normal(size=shape).astype("<f4").tobytes())


def masked(content: bytes) -> int:
    """The checksum as it is stored."""
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    """Seven bits a byte."""
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


@dataclass(frozen=True)
class Written:
    """How the table is written; a test replaces what it is about."""

    parts: Mapping[str, Part]
    header: bytes = b"\x08\x01"
    compression: int = 0
    magic: int = MAGIC
    block_crc: Callable[[bytes], int] = masked
    names: Mapping[str, bytes] = field(default_factory=dict)

    def save(self, folder: Path, prefix: str = "model.ckpt") -> Path:
        """Writes index and values; returns the index."""
        content, entries = b"", [(b"", self.header)]
        for name, part in sorted(self.parts.items()):
            offset = len(content) if part.offset is None else part.offset
            content += part.content
            entries.append((self.names.get(name, name.encode()), _entry(part, offset)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{prefix}.data-00000-of-00001").write_bytes(content)
        (folder / f"{prefix}.index").write_bytes(self._table(entries))
        return folder / f"{prefix}.index"

    def changed(self, name: str, **changes: object) -> Written:
        """With one tensor's entry changed."""
        return replace(self, parts={**self.parts, name: replace(self.parts[name], **changes)})  # type: ignore[arg-type]

    def _table(self, entries: list[tuple[bytes, bytes]]) -> bytes:
        out = self._trailed(_block(entries))
        meta_at, meta = len(out), _block([])
        out += self._trailed(meta)
        index_at = len(out)
        index = _block([(entries[-1][0] + b"\xff", varint(0) + varint(len(_block(entries))))])
        out += self._trailed(index)
        handles = varint(meta_at) + varint(len(meta)) + varint(index_at) + varint(len(index))
        return out + handles.ljust(40, b"\0") + struct.pack("<Q", self.magic)

    def _trailed(self, block: bytes) -> bytes:
        block += bytes([self.compression])
        return block + struct.pack("<I", self.block_crc(block))


def _block(entries: list[tuple[bytes, bytes]]) -> bytes:
    out, before = b"", b""
    for key, value in entries:
        shared = next(
            (i for i, (a, b) in enumerate(zip(key, before, strict=False)) if a != b), min(len(key), len(before))
        )
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + struct.pack("<II", 0, 1)


def _entry(part: Part, offset: int) -> bytes:
    dims = b"".join(_message(2, b"\x08" + varint(size)) for size in part.shape)
    crc = masked(part.content) if part.crc is None else part.crc
    size = len(part.content) if part.size is None else part.size
    return b"".join(
        [
            b"\x08" + varint(part.dtype),
            _message(2, dims),
            b"\x18" + varint(part.shard),
            b"\x20" + varint(offset),
            b"\x28" + varint(size),
            b"\x35" + struct.pack("<I", crc),
            part.extra,
        ]
    )


def _message(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content
