"""The objects that a URI names, as a list that is safe to make files of, and its digest."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from shardyard.remote_uris import ObjectUri
from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.remote.faults import NOT_FOUND
from shardyard_trainer.remote.store import Object, Store

MOST_OBJECTS = 100_000

_MOST_PAGES = 1_000
_MOST_PART_BYTES = 255
_MOST_NAME_BYTES = 2048


class Listing:
    """The objects of a URI by the names that their files get, sorted; `uri` is pinned to them."""

    def __init__(self, uri: ObjectUri, objects: Sequence[Object]) -> None:
        self.objects = {name_of(uri, each): each for each in sorted(objects)}
        lines = "".join(f"{each.key}\0{each.size}\0{each.etag}\n" for each in self.objects.values())
        digest = hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
        self.uri = uri._replace(digest=digest)

    @property
    def num_bytes(self) -> int:
        """The size of all objects together."""
        return sum(each.size for each in self.objects.values())


async def list_objects(store: Store, uri: ObjectUri, *, most: int, field: str) -> Listing:
    """What a URI names now: one object of just that key, else all below it.

    Raises SpecError OBJECT_NOT_FOUND, QUOTA_EXCEEDED for more than `most` objects, DATA_INVALID for names that are
    not ones of files; OSError and others of the object store.
    """
    if not uri.is_prefix and (single := await store.look(uri.bucket, uri.key)) is not None:
        found, where = [single], uri
    else:
        where = uri if uri.is_prefix else uri._replace(key=f"{uri.key}/")
        found = await _below(store, where, most, field)
    if not found:
        text = f"{_shown(uri)}: there is no such object, nor objects below it; check its spelling"
        raise SpecError(field, NOT_FOUND, text)
    check_names([name_of(where, each) for each in found], uri, field=field)
    return Listing(where, found)


def name_of(uri: ObjectUri, each: Object) -> str:
    """The name of an object's file: what follows the prefix, or the last part of the key."""
    return each.key.removeprefix(uri.key) if uri.is_prefix else each.key.rpartition("/")[2]


async def _below(store: Store, uri: ObjectUri, most: int, field: str) -> list[Object]:
    found: list[Object] = []
    pages = 0
    async for page in store.pages(uri.bucket, uri.key):
        # Consoles make an empty object `folder/` for each folder.
        found += [each for each in page if not each.key.endswith("/")]
        pages += 1
        if len(found) > most or pages > _MOST_PAGES:
            text = (
                f"{_shown(uri)}: there are more than {most:,} objects below it, the most that are copied; name "
                "a part of them, or put many into each object (Parquet, JSONL)"
            )
            raise SpecError(field, "QUOTA_EXCEEDED", text, {"most_objects": str(most)})
    if any(not each.key.startswith(uri.key) for each in found):
        raise SpecError(field, "DATA_INVALID", f"{_shown(uri)}: the object store lists keys that are not below it")
    return found


def check_names(names: Sequence[str], uri: ObjectUri, *, field: str) -> None:
    """Raises SpecError DATA_INVALID unless every name is one of a file in one folder, and no two are alike."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        if wrong := _complaint(name):
            text = f"{_shown(uri)}: the key {shorten(name)!r} {wrong}; rename the object"
            raise SpecError(field, "DATA_INVALID", text)
        if (other := seen.setdefault(_folded(name), name)) != name:
            text = f"{_shown(uri)}: the keys {shorten(other)!r} and {shorten(name)!r} are one name on some disks"
            raise SpecError(field, "DATA_INVALID", f"{text}; rename one of the objects")
        for parent in _parents(name):
            folders.setdefault(parent, name)
    for folder, name in folders.items():
        if (file := seen.get(_folded(folder))) is not None:
            text = f"{_shown(uri)}: the keys {shorten(file)!r} and {shorten(name)!r} are a file and a folder of one "
            raise SpecError(field, "DATA_INVALID", f"{text}name; rename one of the objects")


def _complaint(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, . or .. part"
    if not name.isprintable():
        return "has characters that do not print"
    if len(name.encode("utf-8", "surrogatepass")) > _MOST_NAME_BYTES:
        return f"takes more than {_MOST_NAME_BYTES:,} bytes"
    if any(len(part.encode("utf-8", "surrogatepass")) > _MOST_PART_BYTES for part in parts):
        return f"has a part of more than {_MOST_PART_BYTES} bytes"
    return ""


def _parents(name: str) -> Iterable[str]:
    return [str(parent) for parent in PurePosixPath(name).parents if str(parent) != "."]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _shown(uri: ObjectUri) -> str:
    return f"`{shorten(uri.address)}`"
