"""Uploaded and downloaded files: what is sent, under which id, and what has fully arrived.

An upload is named by its content: `d-` (data) or `m-` (model) and 32 hexadecimal digits of the sha256 over its sorted
(path, size, sha256). So the same files are sent once, and an interrupted upload continues, from any process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import google_crc32c

from shardyard._text import is_utf8, not_utf8
from shardyard.errors import DataLoss, InvalidArgument, invalid, local_file

CHUNK_BYTES = 2**20
MAX_FILES = 100_000
_MOST_NAMED = 3
# Weights in a form that could run code, or that torch does not read; left out if there are safetensors.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pkl")


@dataclass(frozen=True)
class LocalFile:
    """A local file: its path in the upload, its location, size and sha256."""

    path: str
    source: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """An upload: its files, and an id made from their content."""

    resource_id: str
    files: tuple[LocalFile, ...]
    display_name: str

    @property
    def request_id(self) -> str:
        """A UUID4 made from the id: sending the same files again continues the same upload."""
        return str(uuid.UUID(bytes=hashlib.sha256(self.resource_id.encode()).digest()[:16], version=4))

    @property
    def size_bytes(self) -> int:
        """The size of all files together, in bytes."""
        return sum(file.size_bytes for file in self.files)

    def check_unchanged(self) -> None:
        """Check that every file still has the size that it was hashed with.

        Raises: InvalidArgument.
        """
        for file in self.files:
            if not file.source.is_file() or file.source.stat().st_size != file.size_bytes:
                raise _changed(file.source)


def package(path: Path, kind: Literal["datasets", "models"]) -> Package:
    """The file, or all files of the folder but hidden ones, hashed.

    Raises: InvalidArgument if there is nothing to send, more than 100,000 files, or a name that is not UTF-8.
    """
    try:
        found = sorted(_listed(path, kind))
        for name, _ in found:
            if not is_utf8(name):
                raise invalid("path", not_utf8(name, "rename the file"))
        files = tuple(_hashed(name, source) for name, source in found)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not files:
        raise invalid("path", f"`{path}` has no files; give a file, or a folder with files")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size_bytes}\0{file.sha256}\n".encode())
    return Package(f"{kind[0]}-{digest.hexdigest()[:32]}", files, _printable(path.name)[:128])


def chunks(file: LocalFile, offset: int) -> Iterator[tuple[int, bytes, int]]:
    """(offset, bytes, crc32c) of the file from `offset` on.

    Raises: InvalidArgument when the file has become shorter since it was hashed, or can no longer be read.
    """
    try:
        with file.source.open("rb") as source:
            source.seek(offset)
            while offset < file.size_bytes:
                data = source.read(min(CHUNK_BYTES, file.size_bytes - offset))
                if not data:
                    raise _changed(file.source)
                yield offset, data, google_crc32c.value(data)
                offset += len(data)
    except OSError as error:
        raise _unreadable(file.source, error) from None


class Download:
    """A file being downloaded to `{target}.part`, checked, renamed; continues where an earlier download stopped."""

    def __init__(self, staging: Path, folder: Path, path: str, size_bytes: int, sha256: str) -> None:
        self.path = path
        self._size_bytes = size_bytes
        self._sha256 = sha256
        self.target = staging / _safe(path)
        self._final = folder / _safe(path)
        self._part = self.target.with_name(self.target.name + ".part")
        self._digest = hashlib.sha256()
        self.offset = 0
        self.is_resumed = False

    def is_done(self) -> bool:
        """Whether the file is already there, whole: from this download or an earlier one."""
        return any(
            path.is_file() and path.stat().st_size == self._size_bytes and sha256_of(path) == self._sha256
            for path in (self.target, self._final)
        )

    def open(self) -> None:
        """Continue from an earlier download's partial file."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._digest = hashlib.sha256()
        self.offset = 0
        if self._part.exists() and self._part.stat().st_size <= self._size_bytes:
            with self._part.open("rb") as part:
                while data := part.read(CHUNK_BYTES):
                    self._digest.update(data)
                    self.offset += len(data)
        else:
            self._part.write_bytes(b"")
        self.is_resumed = self.offset > 0

    @property
    def is_complete(self) -> bool:
        """Whether every byte has arrived."""
        return self.offset >= self._size_bytes

    def write(self, offset: int, data: bytes, crc32c: int) -> None:
        """Append a chunk.

        Raises: DataLoss for a damaged chunk, one that does not follow, or more than was announced.
        """
        if offset != self.offset or google_crc32c.value(data) != crc32c:
            raise DataLoss(f"{self.path}: the chunk at byte {offset} arrived damaged", reason="CRC_MISMATCH")
        if offset + len(data) > self._size_bytes:
            self._part.unlink()
            raise self.damaged(f"it sends more than the {self._size_bytes:,} bytes that it announced")
        with self._part.open("ab") as part:
            part.write(data)
        self._digest.update(data)
        self.offset += len(data)

    def finish(self) -> None:
        """Check the complete file and move it into place.

        Raises: DataLoss if it is not what was announced, FILE_DAMAGED if all of it came from the service now: each
        chunk arrived as it was sent. What arrived is then removed.
        """
        if self.offset != self._size_bytes:
            self._part.unlink()
            raise self.damaged(f"it sent {self.offset:,} bytes of {self._size_bytes:,}")
        if self._sha256 and self._digest.hexdigest() != self._sha256:
            self._part.unlink()
            if self.is_resumed:
                raise DataLoss(
                    f"{self.path}: not the file that was announced; download again", reason="CHECKSUM_MISMATCH"
                )
            raise self.damaged("the sha256 of what it sent is not the one it announced")
        self._part.replace(self.target)

    def damaged(self, why: str) -> DataLoss:
        """The error for a file whose copy in the service is damaged."""
        return DataLoss(
            f"{self.path}: the service's own copy is damaged: {why}; ask its operator to restore the file",
            reason="FILE_DAMAGED",
        )


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Around what writes a download into the folder.

    Raises: FailedPrecondition LOCAL_FILE for what the disk refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Not an error of the disk, for example the caller's time limit.
            raise
        raise local_file(error, f"`{folder}` cannot be written") from error


def make_staging(folder: Path, paths: Sequence[str]) -> tuple[Path, Path]:
    """(staging, folder), both absolute: `staging` is beside the folder, and collects the files.

    Raises: InvalidArgument if a file of another model or data set would end up beside them.
    """
    try:
        folder = folder.resolve()  # `.` and `..` have no name of their own.
    except RuntimeError:  # Python's error for a link that leads back to itself.
        raise invalid("folder", f"`{folder}` is below a link that leads back to itself; give another name") from None
    if not folder.name:
        raise invalid("folder", f"`{folder}` is not a folder to download into; give one below it")
    if folder.exists() and not folder.is_dir():
        raise invalid("folder", f"`{folder}` is not a folder; give another name")
    staging = folder.with_name(folder.name + ".partial")
    wanted = {_safe(path).as_posix() for path in paths}
    for place, known in ((folder, wanted), (staging, wanted | {f"{path}.part" for path in wanted})):
        others = list(itertools.islice((name for name, _ in _visible(place) if name not in known), _MOST_NAMED))
        if others:
            raise invalid(
                "folder",
                f"`{place}` has files that do not belong to the download, such as "
                f"{', '.join(map(_printable, others))}; download into another folder, or empty this one first",
            )
    staging.mkdir(parents=True, exist_ok=True)
    return staging, folder


def publish(staging: Path, folder: Path) -> None:
    """Move the complete download into place: one rename if nothing is there, else file by file."""
    if not folder.exists():
        staging.rename(folder)
        return
    for source in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = folder / source.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    for path in sorted((path for path in staging.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()
    staging.rmdir()


def sha256_of(path: Path) -> str:
    """The file's sha256 as 64 hexadecimal digits."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _listed(path: Path, kind: Literal["datasets", "models"]) -> list[tuple[str, Path]]:
    if path.is_file() and kind == "datasets":
        return [(path.name, path)]
    if not path.is_dir():
        raise invalid("path", f"`{path}` is not a {'folder' if kind == 'models' else 'file or folder'}")
    found = list(itertools.islice(_visible(path), MAX_FILES + 1))
    if len(found) > MAX_FILES:
        raise invalid("path", f"`{path}` has more than {MAX_FILES:,} files")
    return without_other_weights(found) if kind == "models" else found


def _visible(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder but hidden ones, each with its path inside it; empty without such a folder."""
    # Links to folders are not followed: they may lead in a circle. Links to files are: the Hub's cache is made of them.
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            source = Path(folder) / name
            if not name.startswith(".") and source.is_file():
                yield source.relative_to(path).as_posix(), source


def without_other_weights(found: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The files without weights in other formats, if safetensors are among them."""
    if not any(name.endswith(".safetensors") for name, _ in found):
        return list(found)
    return [(name, source) for name, source in found if not name.endswith(OTHER_WEIGHTS)]


def _hashed(name: str, source: Path) -> LocalFile:
    return LocalFile(name, source, source.stat().st_size, sha256_of(source))


def _unreadable(source: Path, error: OSError) -> InvalidArgument:
    return invalid("path", f"`{error.filename or source}` cannot be read: {error.strerror}")


def _changed(source: Path) -> InvalidArgument:
    return invalid("path", f"`{source}` has changed while it was sent; try again when nothing writes to it")


def _safe(path: str) -> Path:
    """A path that stays inside the folder it is put in, whatever the service says."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\\" in path or "\0" in path:
        raise DataLoss(f"the service named a file `{path}` that would be outside the folder", reason="PATH_NOT_ALLOWED")
    return Path(*pure.parts)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
