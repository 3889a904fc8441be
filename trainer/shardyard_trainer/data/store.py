"""Tokens on disk: built once by the first process that needs them, memory-mapped by all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.digests import file_sha256
from shardyard_trainer.data.sources import DataFile, open_regular
from shardyard_trainer.reading import about, reading

_CHUNK = 2**20
_SIZES = "sizes.json"


def build_once(folder: Path, build: Callable[[Path], Any]) -> Path:
    """The folder, built by `build(target)` if it is missing or no longer as it was built.

    Processes that come meanwhile wait for the one that builds; a build that fails or is killed leaves nothing under
    the folder's name.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock_of(folder), fcntl.LOCK_EX) as lock:
        try:
            if not is_whole(folder):
                _build(folder, build)
        finally:
            lock.unlink(missing_ok=True)
    return folder


def _build(folder: Path, build: Callable[[Path], Any]) -> None:
    target = folder.parent / f".{folder.name}.building"
    shutil.rmtree(target, ignore_errors=True)
    if folder.exists():
        # Renamed first, so that no process finds a folder that is half removed.
        folder.replace(target)
        shutil.rmtree(target)
    target.mkdir()
    try:
        build(target)
        _seal(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    target.replace(folder)
    _fsync(folder.parent)


@contextmanager
def locked(path: Path, how: int) -> Iterator[Path]:
    """Holds a lock on a file, which is created if missing; an exclusive holder may remove the file.

    Raises: BlockingIOError if `how` has LOCK_NB and another process holds it.
    """
    lock = open_locked(path, how)
    with lock:
        yield path


def open_locked(path: Path, how: int) -> BinaryIO:
    """As `locked`, until the file is closed. The kernel releases it with the process, so a killed one blocks nobody."""
    while True:
        lock = path.open("ab")
        try:
            fcntl.flock(lock, how)
            ours, there = os.fstat(lock.fileno()), path.stat()
        except FileNotFoundError:  # The file was removed while this process waited: a lock on it protects nothing.
            lock.close()
            continue
        except BaseException:
            lock.close()
            raise
        if os.path.samestat(ours, there):
            return lock
        lock.close()


def sweep(parent: Path) -> None:
    """Removes the leftovers of killed builds in a folder that `build_once` builds in."""
    names = {path.name.removesuffix(".building").removesuffix(".lock") for path in parent.glob(".*.[bl]*")}
    for name in names:
        with suppress(BlockingIOError), locked(parent / f"{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
            shutil.rmtree(parent / f"{name}.building", ignore_errors=True)
            lock.unlink(missing_ok=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder of `build_once` exists, and each of its files has the size it was written with."""
    try:
        sizes = json.loads((folder / _SIZES).read_bytes())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _seal(folder: Path) -> None:
    """Records the files' sizes and syncs them, so that a folder under its final name survives a power cut complete."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / _SIZES).write_text(json.dumps(sizes))
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_fingerprint(files: Iterable[DataFile], *, field: str) -> str:
    """A hash of the files' bytes, formats and order, and of the names of pictures, whose folder is their class.

    Other names, and places, do not count. `field` of the spec named the files.
    """
    total = hashlib.sha256()
    about(field, "DATA_INVALID")
    for file in files:
        reading(file.name)
        digest = file_sha256(file.path, file.name, open_regular)
        name = file.name if file.format == spec_pb2.DATA_FORMAT_IMAGES else ""
        total.update(f"{file.format}:{digest}{name and f':{name}'};".encode())
    return total.hexdigest()


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """A hash of JSON values, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TokenStore:
    """Sequences of tokens end to end: sequence i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray
    offsets: np.ndarray
    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Maps a store that a `TokenWriter` wrote. Raises ValueError if a file is shorter than the store says."""
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r", shape=(size,)) if size else np.zeros(0, dtype)
            for name, (dtype, size) in meta["arrays"].items()
        }
        return cls(arrays.pop("tokens"), arrays.pop("offsets"), arrays, meta["user"])

    @property
    def num_sequences(self) -> int:
        """One less than the offsets, which have the end of the last sequence too."""
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """The length of each sequence in tokens, int32."""
        return np.diff(self.offsets).astype(np.int32)

    def digests(self, rows: np.ndarray) -> np.ndarray:
        """A hash of each of these sequences, uint64: equal ones have equal hashes."""
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        found = (
            hashlib.blake2b(self.tokens[start:end].tobytes(), digest_size=8).digest()
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        )
        return np.frombuffer(b"".join(found), np.uint64)


@dataclass
class TokenWriter:
    """Writes a store in constant memory: sequences as they arrive, other arrays next to them."""

    folder: Path
    token_dtype: str
    _sizes: dict[str, tuple[str, int]] = field(default_factory=dict)
    _streams: dict[str, Any] = field(default_factory=dict)
    _offset: int = 0

    def add(self, sequences: Iterable[Sequence[int]], **aligned: Iterable[Any]) -> None:
        """Appends sequences; `aligned` values are appended to arrays of their names (int64)."""
        if "offsets" not in self._sizes:
            self._append("offsets", np.zeros(1, np.int64))
        listed = list(sequences)
        self._append("tokens", np.fromiter((t for s in listed for t in s), dtype=self.token_dtype))
        ends = self._offset + np.cumsum([len(s) for s in listed], dtype=np.int64)
        self._append("offsets", ends)
        self._offset = int(ends[-1]) if len(ends) else self._offset
        for name, values in aligned.items():
            self._append(name, np.asarray(list(values), dtype=np.int64))

    def add_array(self, name: str, values: np.ndarray) -> None:
        """Appends to an array of any type."""
        self._append(name, values)

    def finish(self, **meta: Any) -> None:
        """Finishes the files; without it the store is not readable."""
        for stream in self._streams.values():
            stream.close()
        (self.folder / "meta.json").write_text(json.dumps({"arrays": self._sizes, "user": meta}))

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._streams:
            self._streams[name] = (self.folder / f"{name}.bin").open("wb")
            self._sizes[name] = (values.dtype.str, 0)
        self._streams[name].write(values.tobytes())
        dtype, size = self._sizes[name]
        self._sizes[name] = (dtype, size + len(values))
