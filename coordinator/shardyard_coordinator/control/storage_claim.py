"""A storage belongs to one store: the sweeps remove what their store does not know, so nobody else's may lie there."""

from __future__ import annotations

from pathlib import Path

from shardyard_coordinator.store.failures import StorageForeign

CLAIM = "store-id"
_OWNED = ("jobs", "models", "datasets")


def claim_storage(storage: Path, store_id: str) -> None:
    """Makes the storage's folders, and the storage this store's own. Raises: StorageForeign, OSError."""
    claim = storage / CLAIM
    owner = claim.read_text(encoding="utf-8").strip() if claim.is_file() else ""
    if owner != store_id:
        held = next((name for name in _OWNED if (storage / name).is_dir() and any((storage / name).iterdir())), "")
        if owner or held:
            whose = (
                f"belongs to the store {owner}, not to this one, {store_id}" if owner else f"has `{held}` of somebody"
            )
            raise StorageForeign(
                f"the storage {storage} {whose}; choose another one with --storage-root, or start with the state "
                "directory that it belongs to"
            )
    for name in (*_OWNED, "cache"):
        (storage / name).mkdir(parents=True, exist_ok=True)
    if not owner:
        draft = claim.with_name(f"{CLAIM}.tmp")
        draft.write_text(f"{store_id}\n", encoding="utf-8")
        draft.replace(claim)
