"""A storage belongs to one store: its sweeps remove folders that the store does not know.

A missing mount is not an empty storage: if the store has jobs or models, a storage without its claim is never
initialised. A storage of a version that wrote no claim is recognised by the folders of the store's own jobs.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from shardyard_coordinator.control.private import make_private
from shardyard_coordinator.launch.claim import CLAIM, read_claim
from shardyard_coordinator.store.failures import StorageForeign, StorageMissing
from shardyard_coordinator.store.holdings import Holdings, look_up
from shardyard_coordinator.store.store import Store

OWNED = ("jobs", "models", "datasets")
_UID = re.compile(r"[0-9a-f]{32}")
# Of each kind; SQLite takes 32,766 values in one statement.
_MOST_LOOKED_AT = 5000


@dataclass(frozen=True)
class _Found:
    """The content of the storage root: its claim, uids of folders, kinds that are not empty, and folders that exist."""

    owner: str
    uids: tuple[str, ...]
    held: tuple[str, ...]
    made: tuple[str, ...]


async def claim_storage(storage: Path, store: Store) -> None:
    """Makes the storage's folders, and claims the storage for this store.

    Raises: StorageForeign, StorageMissing, FolderShared, OSError.
    """
    found = await asyncio.to_thread(_look, storage)
    if found.owner != store.store_id:
        holdings = await store.read(partial(look_up, uids=found.uids))
        _check(storage, store.store_id, found, holdings)
    await asyncio.to_thread(_take, storage, store.store_id, is_claimed=found.owner == store.store_id)


def _look(storage: Path) -> _Found:
    names = {
        kind: tuple(each.name for each in islice((storage / kind).iterdir(), _MOST_LOOKED_AT))
        for kind in OWNED
        if (storage / kind).is_dir()
    }
    return _Found(
        owner=read_claim(storage / CLAIM),
        uids=tuple(name for kind in names.values() for name in kind if _UID.fullmatch(name)),
        held=tuple(kind for kind, found in names.items() if found),
        made=tuple(names),
    )


def _check(storage: Path, store_id: str, found: _Found, holdings: Holdings) -> None:
    """Raises unless this store may claim the storage."""
    if found.owner:
        raise _foreign(storage, f"belongs to the store {found.owner[:64]!r}, not to this one, {store_id}")
    if holdings.recognises:
        return  # An older version wrote no claim.
    if found.held and not holdings.has_files:
        raise _foreign(storage, f"has `{found.held[0]}` that this store does not know")
    if holdings.has_files or (holdings.knows and not found.made):
        raise StorageMissing(
            f"the storage {storage} is not there: it has neither the file `{CLAIM}` nor any folder of this store's "
            "jobs and models, so it is probably a mount point whose mount is missing; mount it and start again. If "
            f"its files are permanently lost, start with an empty one: make {storage} and write {store_id} into "
            f"{storage / CLAIM}"
        )


def _foreign(storage: Path, whose: str) -> StorageForeign:
    return StorageForeign(
        f"the storage {storage} {whose}; choose another one with --storage-root, or start with the state directory "
        "that it belongs to"
    )


def _take(storage: Path, store_id: str, *, is_claimed: bool) -> None:
    make_private(storage)
    for name in (*OWNED, "cache", "objects"):
        (storage / name).mkdir(exist_ok=True)
    if not is_claimed:
        draft = storage / f"{CLAIM}.tmp"
        with draft.open("w", encoding="utf-8") as file:
            file.write(f"{store_id}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(storage / CLAIM)
