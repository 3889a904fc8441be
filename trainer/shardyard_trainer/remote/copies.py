"""The folder of copies, which all projects share: bytes by their sha256, and a folder of links for each pinned URI.

    blobs/SHA256          the bytes of an object; .OBJECT.part while it arrives, .OBJECT.kept between two calls
    objects/OBJECT        which blob an object of that store, key, size and ETag has
    copies/URI-DIGEST/    index.json, and files/ as the spec's reader sees them

A blob or folder is renamed into place when it is complete, so that a partial one is never taken for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from shardyard.remote_uris import ObjectUri, copy_of
from shardyard_trainer.remote.store import Object

_SHA = re.compile(r"[0-9a-f]{64}")
# Longer than a plan takes from the copy to the job that keeps it.
_FRESH_S = 3600.0


class Copies:
    """The copies below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.blobs = folder / "blobs"
        self._objects = folder / "objects"
        self._copies = folder / "copies"
        for each in (self.blobs, self._objects, self._copies):
            each.mkdir(parents=True, exist_ok=True)

    def has(self, uri: ObjectUri) -> bool:
        """Whether the copy of a pinned URI is here; it then counts as used now."""
        place = self._folder / copy_of(uri)
        if not place.exists():
            return False
        with suppress(OSError):
            os.utime(self._place(uri))
        return True

    def blob(self, name: str, wanted: Object) -> Path | None:
        """The bytes of an object, if they are here. `name` is what `object_name` says."""
        with suppress(OSError):
            digest = (self._objects / name).read_text(encoding="ascii").strip()
            path = self.blobs / digest
            if _SHA.fullmatch(digest) and path.stat().st_size == wanted.size:
                return path
        return None

    def keep(self, name: str, part: Path, digest: str) -> None:
        """Takes a whole file over, as the bytes of an object."""
        part.chmod(0o400)
        part.replace(self.blobs / digest)
        draft = self._objects / f".{name}.{secrets.token_hex(4)}"
        draft.write_text(digest, encoding="ascii")
        draft.replace(self._objects / name)

    def put_together(self, uri: ObjectUri, files: Mapping[str, Path]) -> None:
        """Makes the folder of a pinned URI of blobs by the names of its files."""
        place = self._place(uri)
        draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            for name, blob in files.items():
                path = draft / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _link(blob, path)
            sizes = {name: [blob.stat().st_size, blob.name] for name, blob in files.items()}
            (draft / "index.json").write_text(json.dumps({"uri": str(uri), "files": sizes}), encoding="utf-8")
            with suppress(OSError):  # Another call was faster.
                draft.rename(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        if not place.is_dir():
            raise OSError(f"{place} could not be made")

    def used_bytes(self) -> int:
        """Bytes of all blobs, whole ones and others."""
        return sum(size for _, size, _ in self._files())

    def make_room(self, need: int, *, kept: Iterable[ObjectUri]) -> int:
        """Removes the copies that were not used for the longest time, until `need` bytes are free of them; not those in
        `kept`, nor those of the last hour. Returns how many bytes went.
        """
        spared = {self._place(uri).name for uri in kept}
        before_s = time.time() - _FRESH_S
        old = [
            (each.stat().st_mtime, each)
            for each in self._copies.iterdir()
            if each.name not in spared and each.stat().st_mtime < before_s
        ]
        gone = self._remove_unused(before_s)
        for _, copy in sorted(old):
            if gone >= need:
                break
            shutil.rmtree(copy, ignore_errors=True)
            gone += self._remove_unused(before_s)
        for entry in self._objects.iterdir():
            with suppress(OSError):
                if not (self.blobs / entry.read_text(encoding="ascii")).exists():
                    entry.unlink()
        return gone

    def _remove_unused(self, before_s: float) -> int:
        """Removes the blobs that no copy has, and the leftovers of calls that ended."""
        gone = 0
        for path, size, found in self._files():
            if found.st_nlink == 1 and max(found.st_mtime, found.st_ctime) < before_s:
                with suppress(OSError):
                    path.unlink()
                    gone += size
        return gone

    def _files(self) -> list[tuple[Path, int, os.stat_result]]:
        found = []
        with os.scandir(self.blobs) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((Path(entry.path), status.st_size, status))
        return found

    def _place(self, uri: ObjectUri) -> Path:
        return self._folder.joinpath(*copy_of(uri).split("/")[:2])


def object_name(endpoint: str, bucket: str, wanted: Object) -> str:
    """The name of an object's bytes: of the store, the bucket, and all that says which bytes they are."""
    parts = "\0".join((endpoint, bucket, wanted.key, str(wanted.size), wanted.etag))
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


def _link(blob: Path, path: Path) -> None:
    try:
        os.link(blob, path)
    except OSError:
        # A file system without links, or with too many of one file.
        shutil.copyfile(blob, path)
