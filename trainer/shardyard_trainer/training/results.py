"""A job's result as a folder: made durable, moved into place as a whole, and described file by file."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path

from shardyard.v1 import transfer_pb2
from shardyard_trainer.training.shards import fsync_folder


def sync(folder: Path) -> None:
    """Makes all files of a folder durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def put_in_place(building: Path, folder: Path) -> None:
    """Renames a folder to its final name, and replaces the folder of an earlier attempt."""
    if folder.exists():
        # First out of the way: the folder is never half old, half new. A rank that may not write into the old one
        # leaves it to the coordinator, which removes what has such a name. Another one may be left from before.
        old = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
        folder.rename(old)
        building.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        building.rename(folder)
    fsync_folder(folder.parent)


def stored_files(folder: Path) -> list[transfer_pb2.StoredFile]:
    """All files of a folder with their sizes and hashes, sorted by path."""
    return [_stored(path, str(path.relative_to(folder))) for path in sorted(folder.rglob("*")) if path.is_file()]


def _stored(path: Path, name: str) -> transfer_pb2.StoredFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return transfer_pb2.StoredFile(path=name, size_bytes=size, sha256=digest, committed_bytes=size)
