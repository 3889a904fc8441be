"""Whether the storage is mounted: an empty folder below a missing mount must not be taken for it.

The service says in `Locations.claim` which file shows that; a spec run by hand has none, and nothing is checked.
"""

from __future__ import annotations

from pathlib import Path

from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.failures import RunFailed, storage_failure

NEXT_STEP = "mount the storage again on this node"


def missing_storage(locations: worker_pb2.Locations) -> RunFailed | None:
    """The failure if the storage is not mounted; None if it is."""
    if not locations.HasField("claim"):
        return None
    path = Path(locations.claim.path)
    try:
        found = path.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        found = ""
    except PermissionError:
        # A rank is confined to the folders that were there when it started (docs/compute.md): a new one works again.
        return RunFailed(
            "STORAGE_UNAVAILABLE",
            f"the storage root {path.parent} may not be read any more: it was mounted or recreated under this rank",
            "if the next attempt fails in the same way, let the service's account read the storage root",
            {"path": str(path.parent)},
        )
    except OSError as error:
        return storage_failure(error, "the storage's claim", on_storage=True)
    if found == locations.claim.store_id:
        return None
    what = f"holds the claim of another store, {found[:64]!r}" if found else f"has no file `{path.name}`"
    return RunFailed(
        "STORAGE_UNAVAILABLE",
        f"the storage root {path.parent} {what}: it is not mounted",
        NEXT_STEP,
        {"path": str(path.parent)},
    )


def check_storage(locations: worker_pb2.Locations) -> None:
    """Raises RunFailed(STORAGE_UNAVAILABLE) unless the storage is there; asked before anything is written to it."""
    if (missing := missing_storage(locations)) is not None:
        raise missing
