"""The files of one rank's part of a checkpoint: hashed on the way, fsynced, and never half believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import xxhash

Trace = Callable[[str], None]
"""Passes a named point of the code (docs/reliability.md): timed in production, crashed at in tests."""

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardFile:
    """One file of a checkpoint: its path inside the folder, its size, and its xxh3-128 in hexadecimal."""

    path: str
    bytes: int
    xxh3: str


class ShardWriter:
    """Writes one rank's files. After a failure `error` says what it was, and nothing more is written."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.files: list[ShardFile] = []
        self.error: OSError | None = None

    def write(self, state: Any, path: Path) -> None:
        """Writes `torch.save(state)` to `path` and fsyncs it; never raises for the disk's sake."""
        if self.error is not None:
            return
        try:
            with open(path, "wb", buffering=READ_BYTES) as out:
                file = _HashingFile(out)
                try:
                    torch.save(state, cast(IO[bytes], file))
                except RuntimeError as error:
                    # torch reports a full disk as an unexpected position; the file knows better.
                    raise (file.error or error) from error
                self._trace("shard.written")
                out.flush()
                os.fsync(out.fileno())
                self._trace("shard.fsynced")
            size = path.stat().st_size
            if size != file.size:
                raise OSError(f"{path} has {size} bytes on disk, {file.size} were written")
        except OSError as error:
            self.error = error
            return
        self.files.append(ShardFile(path.name, file.size, file.hash.hexdigest()))


class _HashingFile:
    """The file that torch.save writes to: it hashes and counts what passes."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.size = 0
        self.hash = xxhash.xxh3_128()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._out.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Has nothing to flush."""


def damage(folder: Path, file: ShardFile) -> str | None:
    """The fault of a checkpoint's file, as a sentence that names it, or None."""
    path = folder / file.path
    hasher = xxhash.xxh3_128()
    size = 0
    try:
        if path.exists() and not path.is_file():  # Reading a pipe would wait forever.
            return f"{file.path} is not a file"
        with open(path, "rb", buffering=0) as source:
            while block := source.read(READ_BYTES):
                hasher.update(block)
                size += len(block)
    except OSError as error:
        return f"{file.path}: {error.strerror or error}"
    if size != file.bytes:
        return f"{file.path} has {size} bytes, the manifest says {file.bytes}"
    if hasher.hexdigest() != file.xxh3:
        return f"{file.path} has the hash {hasher.hexdigest()}, the manifest says {file.xxh3}"
    return None


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
