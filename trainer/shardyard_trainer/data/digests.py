"""The bytes of data files: their hashes, and whether an uploaded data set is still what was uploaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeAlias

from shardyard.v1 import transfer_pb2
from shardyard_trainer.data.errors import DataError

CHANGED = "DATA_CHANGED"
_CHUNK = 1 << 20


Opens: TypeAlias = Callable[[Path, str], BinaryIO]
"""Opens a file under the name that messages show; raises DataError."""


def file_sha256(path: Path, name: str, open_file: Opens) -> str:
    """The sha256 in hexadecimal, remembered until the file changes. Raises DataError, OSError."""
    found = path.stat()
    # ctime as well as mtime: content that was replaced with its mtime kept is still noticed.
    return _sha256(path, name, open_file, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


def damage_of(base: Path, known: Iterable[transfer_pb2.StoredFile], open_file: Opens) -> tuple[str, str] | None:
    """The first file of a folder that differs from its upload, and how; None if all are equal."""
    for file in known:
        path = base / file.path
        try:
            size = path.stat().st_size
            if size != file.size_bytes:
                return file.path, f"has {size:,} bytes, {file.size_bytes:,} were uploaded"
            if file.sha256 and file_sha256(path, file.path, open_file) != file.sha256:
                return file.path, "does not have the sha256 that it was uploaded with"
        except FileNotFoundError:
            return file.path, "is missing"
        except DataError as error:
            return file.path, error.message
    return None


@lru_cache(maxsize=2**16)
def _sha256(path: Path, name: str, open_file: Opens, _identity: tuple[int, int, int, int]) -> str:
    # One build asks for the same hash several times.
    digest = hashlib.sha256()
    with open_file(path, name) as stream:
        try:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=name) from None
    return digest.hexdigest()
