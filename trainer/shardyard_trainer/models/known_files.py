"""The bytes of a model's or tokenizer's files: their hashes, and whether they are those that were registered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from shardyard.v1 import transfer_pb2
from shardyard_trainer.models.door import Folder, FolderInvalid

CHANGED = "MODEL_CHANGED"
_READ_BYTES = 1 << 20


def check_known(folder: Folder, known: Iterable[transfer_pb2.StoredFile]) -> None:
    """Compares a folder of the service's own storage with what it was uploaded or exported as.

    Raises FolderInvalid MODEL_CHANGED that names the file.
    """
    wanted = {file.path: file for file in known if folder.reads(file.path)}
    if not wanted:
        return
    there = set(file_names(folder))
    for name in sorted({*wanted, *there}):
        if name not in wanted:
            raise _damaged(name, "was added to the folder after it had been registered")
        if name not in there:
            raise _damaged(name, "is missing")
        size = (folder.path / name).stat().st_size
        if size != wanted[name].size_bytes:
            raise _damaged(name, f"has {size:,} bytes, it was registered with {wanted[name].size_bytes:,}")
        if wanted[name].sha256 and digest(folder, name) != wanted[name].sha256:
            raise _damaged(name, "does not have the sha256 that it was registered with")


def file_names(folder: Folder) -> list[str]:
    """Every file of the folder that is ever read, sorted."""
    return sorted(name for name in folder.names() if folder.reads(name))


def digest(folder: Folder, name: str, *, as_git: bool = False) -> str:
    """The sha256 of a file, or the name that git gives to its bytes. Raises FolderInvalid."""
    status = (folder.path / name).stat()
    return _hashed(folder, name, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns), as_git)


@lru_cache(maxsize=4096)
def _hashed(folder: Folder, name: str, identity: tuple[int, int, int, int], as_git: bool) -> str:
    # Remembered while nothing of the file changes: a plan asks for it several times.
    total = hashlib.sha1(b"blob %d\0" % identity[1], usedforsecurity=False) if as_git else hashlib.sha256()
    with folder.open(name) as file:
        try:
            while block := file.read(_READ_BYTES):
                total.update(block)
        except OSError as error:
            raise _damaged(name, f"cannot be read: {error.strerror}") from None
    return total.hexdigest()


def _damaged(name: str, how: str) -> FolderInvalid:
    return FolderInvalid(
        f"the service's copy is damaged: {name} {how}; restore the file, or delete the model and upload it again",
        reason=CHANGED,
        file=name,
    )
