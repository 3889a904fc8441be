"""The files of an upload while they arrive: each chunk is checked, then written to its file.

Only the service can read the files and folders (0600, 0700). A file is made when its first bytes arrive.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Final

import google_crc32c

from shardyard.v1 import transfer_pb2
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord

_NAMED: Final = 100
"""Files that are named when an upload ends early."""


class Arriving:
    """Files in the order of the header, and how much of each has arrived."""

    def __init__(self, files: Sequence[FileRecord]) -> None:
        self.files = files
        self.committed = [file.committed_bytes for file in files]
        self.missing = sum(file.size_bytes - file.committed_bytes for file in files)

    def check(self, chunk: transfer_pb2.Chunk, most: int) -> None:
        """Raises: Refused UPLOAD_MISMATCH, CHUNK_TOO_LARGE, CRC_MISMATCH; nothing of such a chunk is kept."""
        if chunk.file_index >= len(self.files):
            text = f"`{chunk.file_index}` is not one of the header's files 0 to {len(self.files) - 1}; correct it"
            raise mismatch("chunk.file_index", text)
        if (size := len(chunk.data)) > most:
            text = f"{size:,} bytes; a chunk has at most {most:,} (1 MiB); send smaller ones"
            raise refused_fields([FieldViolation("chunk.data", text, Reason.CHUNK_TOO_LARGE)])
        file, have = self.files[chunk.file_index], self.committed[chunk.file_index]
        if chunk.offset != have:
            kind = "a gap" if chunk.offset > have else "bytes that have arrived already"
            text = f"`{chunk.offset}` leaves {kind}: {have:,} bytes of {file.path} have arrived; continue from there"
            raise mismatch("chunk.offset", text, file=file.path, committed_bytes=str(have))
        if have + size > file.size_bytes:
            text = f"{have + size:,} bytes of {file.path}, announced with {file.size_bytes:,}; correct the header"
            raise mismatch("chunk.data", text)
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            text = f"the crc32c of the chunk at {chunk.offset} of {file.path} is not that of its data; send it again"
            raise Refused(Reason.CRC_MISMATCH, text, metadata={"offset": str(chunk.offset), "file": file.path})

    def wrote(self, at: int, num_bytes: int) -> None:
        """Counts bytes that were written to a file."""
        self.committed[at] += num_bytes
        self.missing -= num_bytes

    def ended_early(self) -> Refused:
        """The error of an upload that ends with bytes missing."""
        found: list[FieldViolation] = []
        for at, (file, size) in enumerate(zip(self.files, self.committed, strict=True)):
            if size < file.size_bytes and len(found) < _NAMED:
                text = f"{size:,} of {file.size_bytes:,} bytes of {file.path} arrived"
                step = "; send the rest with the same request_id"
                found.append(FieldViolation(f"files[{at}]", text + step, Reason.UPLOAD_MISMATCH))
        return refused_fields(found)


def mismatch(field: str, text: str, **metadata: str) -> Refused:
    """The error of a message that contradicts the header."""
    return refused_fields([FieldViolation(field, text, Reason.UPLOAD_MISMATCH, metadata)])


class Writer:
    """Appends chunks to files; blocks. A call that was cancelled may still be writing when the next one comes."""

    def __init__(self, folder: Path, arriving: Arriving) -> None:
        self._folder = folder
        self._arriving = arriving
        self._open: FileIO | None = None
        self._at = -1
        self._touched: set[int] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.unsynced = 0

    def write(self, chunk: transfer_pb2.Chunk) -> None:
        """Appends a checked chunk; does nothing once it is closed. Raises: OSError."""
        with self._lock:
            if self._closed or not chunk.data:
                return
            if self._at != chunk.file_index:
                self._sync_file()
                self._release()
                self._at = chunk.file_index
                self._open = _open(self._folder, self._arriving.files[self._at].path, chunk.offset)
            assert self._open is not None
            rest = memoryview(chunk.data)
            while rest:
                rest = rest[self._open.write(rest) :]
            self._arriving.wrote(self._at, len(chunk.data))
            self._touched.add(self._at)
            self.unsynced += len(chunk.data)

    def sync(self) -> dict[str, int]:
        """Makes everything written durable; returns the changed files with their sizes."""
        with self._lock:
            self._sync_file()
            touched, self._touched, self.unsynced = sorted(self._touched), set(), 0
            return {self._arriving.files[at].path: self._arriving.committed[at] for at in touched}

    def close(self) -> None:
        """Closes the open file; later writes do nothing."""
        with self._lock:
            self._closed = True
            self._release()

    def _release(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _sync_file(self) -> None:
        if self._open is not None:
            os.fsync(self._open.fileno())


def _open(folder: Path, path: str, offset: int) -> FileIO:
    """Opens the file, cut to its committed bytes: later bytes may be incomplete on the disk.

    Unbuffered, so that no flush repeats a write that a full disk has refused.
    """
    make_folders(folder, [path])
    descriptor = os.open(folder / path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return FileIO(descriptor, "r+b")
    except BaseException:
        os.close(descriptor)
        raise


def make_folders(folder: Path, paths: Iterable[str]) -> None:
    """Makes the folders of the files below `folder`, readable by the service alone."""
    for path in paths:
        parents = [folder / parent for parent in reversed(Path(path).parents) if parent.name]
        for parent in parents:
            parent.mkdir(mode=0o700, exist_ok=True)


def cut(folder: Path, files: Iterable[FileRecord]) -> None:
    """Cuts each file to its committed bytes; missing files are skipped."""
    for file in files:
        if (path := folder / file.path).exists():
            os.truncate(path, file.committed_bytes)


def make_empty(folder: Path, files: Iterable[FileRecord]) -> None:
    """Makes the files that have no bytes."""
    empty = [file.path for file in files if not file.size_bytes]
    make_folders(folder, empty)
    for path in empty:
        os.close(os.open(folder / path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))


def differing(folder: Path, files: Sequence[FileRecord]) -> list[FileRecord]:
    """The files whose sha256 is not the one announced, or that are gone; makes the folders' entries durable."""
    wrong = []
    for file in files:
        try:
            with (folder / file.path).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
                    continue
        except FileNotFoundError:
            pass
        wrong.append(file)
    for each in {folder, *(path for file in files for path in (folder / file.path).parents if folder in path.parents)}:
        _sync_folder(each)
    return wrong


def _sync_folder(folder: Path) -> None:
    """Makes the entries of a folder durable, as the bytes of its files are."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
