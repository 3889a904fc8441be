"""What was sent of a copy to an object store, in a file beside the copies from there: the next call continues from it.

An upload is noted before its first part is sent, so that parts which a crash leaves there are found again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_KEPT_S = 30 * 86_400.0


@dataclass
class LargeFile:
    """A file that is sent in parts: their MD5s, the upload's id, and the ETags of those that were sent, by number."""

    md5s: list[str]
    upload: str = ""
    etags: dict[str, str] = field(default_factory=dict)


class Notes:
    """The notes of one copy, which one process writes at a time; use `open_notes`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.etags: dict[str, str] = {}
        """By key: the ETags of objects that have the bytes of their files."""
        self.large: dict[str, LargeFile] = {}
        """By key: what is being sent in parts."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            self._read(json.loads(path.read_text(encoding="utf-8")))

    def _read(self, found: dict[str, Any]) -> None:
        large = {str(key): LargeFile(**each) for key, each in found["large"].items()}
        self.etags, self.large = {str(key): str(etag) for key, etag in found["etags"].items()}, large

    def save(self) -> None:
        """Writes them. Raises OSError."""
        draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        text = json.dumps({"etags": self.etags, "large": {key: asdict(each) for key, each in self.large.items()}})
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        finally:
            draft.unlink(missing_ok=True)

    def sent(self, key: str, etag: str) -> None:
        """The object is there. Raises OSError."""
        self.etags[key] = etag
        self.large.pop(key, None)
        self.save()

    def remove(self) -> None:
        """The copy is over."""
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_notes(folder: Path, name: str) -> Iterator[Notes | None]:
    """The notes of a copy; None while another process writes them. Those that nobody has used for a month go."""
    folder.mkdir(parents=True, exist_ok=True)
    before_s = time.time() - _KEPT_S
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime < before_s:
                entry.unlink()
    lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        os.utime(lock)
        yield Notes(folder / f"{name}.json")
    finally:
        os.close(lock)
