"""Whether the storage is mounted: under a missing mount there is an empty folder, which is not an empty storage."""

from __future__ import annotations

import errno
from pathlib import Path

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.protocols import StorageFailed

CLAIM = "store-id"
"""The file in the storage root that names the store which the storage belongs to."""


def claim_of(storage: Path, store_id: str) -> worker_pb2.StorageClaim:
    """The claim that a store has on its storage."""
    return worker_pb2.StorageClaim(path=str(storage / CLAIM), store_id=store_id)


def read_claim(path: Path) -> str:
    """The id in a claim's file; empty if there is no such file, or a folder is at its path. Raises: OSError."""
    try:
        return _read(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return _read(path)  # A stale handle of an NFS client: the second try looks up the name again.


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def check_claim(claim: worker_pb2.StorageClaim) -> None:
    """Raises: StorageFailed unless the storage has its store's claim; call it before writing anything."""
    path = Path(claim.path)
    try:
        found = read_claim(path)
    except OSError as error:
        raise StorageFailed.of(error) from error
    if found != claim.store_id:
        what = f"holds the claim of another store, {found[:64]!r}" if found else f"has no file `{path.name}`"
        raise StorageFailed(f"the storage root {path.parent} {what}: it is not mounted", Cause.STORAGE_UNAVAILABLE)
