"""The only access to model and tokenizer folders: every byte of a user's folder is read through `Folder.open`.

Only files of an allow-list are opened, only regular ones, and only if the file that was really opened is inside the
folder's roots. That is asked of the open descriptor, so a link that is exchanged meanwhile changes nothing. What the
files say is never handed to a library as a path, a class or a keyword argument of its choice: `settings` picks the
known settings out of the JSON files, `vocabularies` builds tokenizers, `weights` reads tensors.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from shardyard import export_formats
from shardyard_trainer.data.errors import shorten
from shardyard_trainer.reading import reading

MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_VOCABULARY_BYTES = 64 * 1024 * 1024
"""A tokenizer.json of 260,000 tokens has 33 MB."""

_MOST_ENTRIES = 10_000
_POINTER = b"version https://git-lfs"
_OF_THE_FOLDER = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO}
)
_ALLOWED = frozenset(
    {
        *("config.json", "generation_config.json", "shardyard.json", "head.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja"),
        *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
        *("model.safetensors.index.json", "modules.json"),
        *(f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert")),
        *("sentence_xlm-roberta_config.json", "sentence_xlnet_config.json"),
        *("config_sentence_transformers.json", "adapter_config.json"),
        "items.json",
        "preprocessor_config.json",
    }
)
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
# Parts of sentence-transformers: `1_Pooling/config.json`, `2_Dense/model.safetensors`.
_PART = re.compile(r"[0-9]+_[A-Za-z]+")
_PARTS = re.compile(r"[0-9]+_[A-Za-z]+/(config\.json|model\.safetensors)")
FORMATS = export_formats.FOLDER
"""The folder in a model folder with further formats of it, which are never read."""

CODE = "torch_hub"
"""The folder in a model folder with the code that it was made by: a copy of a repository of PyTorch Hub."""


class FolderInvalid(ValueError):
    """A folder is not a model that loads; `reason` is one of the contract's, `metadata` names file or tensor."""

    def __init__(self, message: str, *, reason: str = "MODEL_INVALID", **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = {key: value[:400] for key, value in metadata.items() if value}


def is_allowed(name: str) -> bool:
    """Whether a file of this name is opened in a Hugging Face folder."""
    is_code = name.startswith(f"{CODE}/") and ".." not in name.split("/")
    return name in _ALLOWED or is_code or bool(_WEIGHTS.fullmatch(name) or _PARTS.fullmatch(name))


@dataclass(frozen=True)
class Folder:
    """A folder of untrusted files. Made by `open_folder`; equal folders are equally allowed to link.

    `roots` are where its files may really be: the folder itself, or the data roots or the cache that it is part of.
    `runs` are the repositories of PyTorch Hub whose code may run if this folder has it: those that the operator allows,
    for folders that this service wrote itself, and none for any other folder.
    `also` are names that are opened besides those of Hugging Face folders: those of a checkpoint that is converted.
    `no_tokenizer` says, of a folder that was made by converting another, why it has no tokenizer and what helps.
    """

    path: Path
    roots: tuple[Path, ...]
    runs: tuple[str, ...] = ()
    also: re.Pattern[str] | None = None
    no_tokenizer: str = ""

    def reads(self, name: str) -> bool:
        """Whether a file of this name (relative to the folder) is ever opened."""
        return is_allowed(name) or (self.also is not None and self.also.fullmatch(name) is not None)

    def has(self, name: str) -> bool:
        """Whether there is such a regular file, and it is one that is read. Raises FolderInvalid if that is hidden."""
        if not self.reads(name):
            return False
        try:
            return stat.S_ISREG((self.path / name).stat().st_mode)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP} and self.path.is_dir():
                return False
            raise _unreadable(name, error) from None

    def names(self) -> frozenset[str]:
        """The files in it, allowed or not, at two levels, and of its code at every level.

        Raises FolderInvalid if they may not be listed, or are too many for a model.
        """
        try:
            entries = list(_entries(self.path))
            top = [path for path in entries if path.is_file() or _PART.fullmatch(path.name)]
            inner = [each for path in top if path.is_dir() for each in _entries(path) if each.is_file()]
        except OSError as error:
            raise _unreadable(self.path.name, error) from None
        code = self._code() if self.path / CODE in entries else []
        return frozenset(str(path.relative_to(self.path)) for path in (*top, *inner, *code) if not path.is_dir())

    def _code(self) -> list[Path]:
        walk = (Path(folder, name) for folder, _, names in os.walk(self.path / CODE) for name in names)
        found = list(islice(walk, _MOST_ENTRIES + 1))
        if len(found) > _MOST_ENTRIES:
            raise _too_many()
        return found

    def weight_names(self) -> list[str]:
        """The names of its safetensors files, sorted."""
        return sorted(name for name in self.names() if _WEIGHTS.fullmatch(name))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file of the folder for reading. Raises FolderInvalid for one that is not there or may not be read."""
        if not self.reads(name):
            raise FolderInvalid(f"{shorten(name)!r} is not a file that is read from a model folder", file=name)
        reading(name)
        try:
            # O_NONBLOCK: opening a FIFO would wait for its writer forever.
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(name, error) from None
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FolderInvalid(f"{name} is not a regular file; only those are read", file=name)
            if not _is_inside(Path(f"/proc/self/fd/{descriptor}").readlink(), self.roots):
                raise _leaves(name)
            if file.read(len(_POINTER)) == _POINTER:
                raise FolderInvalid(
                    f"{name} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`", file=name
                )
            file.seek(0)
            yield file

    def read(self, name: str, *, most_bytes: int) -> bytes:
        """The content of a file. Raises FolderInvalid for a larger one."""
        with self.open(name) as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise FolderInvalid(f"{name} is larger than {most_bytes:,} bytes; it is not read", file=name)
        return content

    def read_text(self, name: str, *, most_bytes: int = MAX_CONFIG_BYTES) -> str:
        """The content of a file of UTF-8 text. Raises FolderInvalid."""
        try:
            return self.read(name, most_bytes=most_bytes).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FolderInvalid(f"{name} is not UTF-8: byte {error.start:,} is not; save it again", file=name) from None

    def read_json(self, name: str, *, most_bytes: int = MAX_CONFIG_BYTES) -> Any:
        """The JSON value in a file. Raises FolderInvalid."""
        text = self.read_text(name, most_bytes=most_bytes)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FolderInvalid(f"{name} is not JSON: {_json_complaint(error)}", file=name) from None

    def read_object(self, name: str, *, what: str = "") -> dict[str, Any]:
        """The JSON object in a file. Raises FolderInvalid; `what` explains why a missing file is needed."""
        if not self.has(name):
            raise FolderInvalid(f"the folder has no {name}" + (f"; {what}" if what else ""), file=name)
        value = self.read_json(name)
        if not isinstance(value, dict):
            raise FolderInvalid(f"{name} is not a JSON object", file=name)
        return value


def _json_complaint(error: Exception) -> str:
    """The error of a text that is not JSON, and its place."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}; save it again"
    return "it is nested too deeply" if isinstance(error, RecursionError) else "it has a number of thousands of digits"


def open_folder(
    path: Path, *, roots: tuple[Path, ...] = (), runs: Iterable[str] = (), also: re.Pattern[str] | None = None
) -> Folder:
    """The folder at `path`, whose files may be links to files under `roots`; without any, inside itself.

    `runs` are the repositories whose code may run, only for a folder that this service wrote itself.
    """
    resolved = path.resolve()
    within = tuple(root.resolve() for root in roots) or (resolved,)
    return Folder(resolved, within, tuple(sorted(runs)), also)


def refuse_links(folder: Folder) -> None:
    """Looks at every entry at any depth. Raises FolderInvalid for a link that leaves the roots, a FIFO or a device."""
    folder.names()
    number = 0
    for directory, folders, names in os.walk(folder.path):
        for name in (*folders, *names):
            number += 1
            path = Path(directory, name)
            if number > _MOST_ENTRIES:
                raise _too_many()
            _refuse_entry(path, str(path.relative_to(folder.path)), folder.roots)


def _refuse_entry(path: Path, shown: str, roots: tuple[Path, ...]) -> None:
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            # Nothing else can be outside: the way here was resolved, and links to folders are not walked into.
            path = path.resolve(strict=True)
            status = path.stat()
    except (OSError, RuntimeError):
        raise FolderInvalid(
            f"{shorten(shown)!r} is not a regular file, but a link to nothing; copy the file itself", file=shown
        ) from None
    if not _is_inside(path, roots):
        raise _leaves(shown)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise FolderInvalid(f"{shorten(shown)!r} is not a regular file; only those are read", file=shown)


def signature(path: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """Changes whenever a file of the folder does: name, inode, size, mtime, ctime of each, sorted; links followed.

    Of folders behind links only parts of sentence-transformers count: no other one is read. Further formats of the
    model do not count: they come and go while it is used.
    """
    found = []
    for directory, folders, names in os.walk(path):
        if Path(directory) == path and FORMATS in folders:
            folders.remove(FORMATS)
        linked = [name for name in folders if _PART.fullmatch(name) and Path(directory, name).is_symlink()]
        behind = [f"{part}/{name}" for part in linked for name in _names_in(Path(directory, part))]
        for name in (*names, *behind):
            full = Path(directory, name)
            try:
                status = full.stat()
            except OSError:  # a link to nothing
                status = full.lstat()
            found.append(
                (str(full.relative_to(path)), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            )
    return tuple(sorted(found))


def _names_in(linked: Path) -> list[str]:
    try:
        return [entry.name for entry in islice(linked.iterdir(), _MOST_ENTRIES)]
    except OSError:  # it may not be listed
        return []


def _unreadable(name: str, error: OSError) -> Exception:
    """The folder's fault, if it is one; a failing disk or a lack of descriptors is not the user's fault."""
    if error.errno not in _OF_THE_FOLDER:
        return error
    gone = isinstance(error, FileNotFoundError)
    step = "put it back" if gone else "make it readable for the service's account"
    return FolderInvalid(f"{shorten(name)!r} cannot be read: {error.strerror}; {step}", file=name)


def _entries(directory: Path) -> list[Path]:
    found = list(islice(directory.iterdir(), _MOST_ENTRIES + 1))
    if len(found) > _MOST_ENTRIES:
        raise _too_many()
    return found


def _too_many() -> FolderInvalid:
    return FolderInvalid(f"the folder has more than {_MOST_ENTRIES:,} files; give the folder of one model")


def _leaves(name: str) -> FolderInvalid:
    return FolderInvalid(
        f"{shorten(name)!r} is not a regular file of the folder, but a link out of it; copy the file into the folder",
        file=name,
    )


def _is_inside(path: Path, roots: tuple[Path, ...]) -> bool:
    return any(path == root or root in path.parents for root in roots)
