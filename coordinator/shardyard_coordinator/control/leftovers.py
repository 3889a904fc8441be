"""Removes incomplete files of a gang that was killed, once nothing of it runs any more."""

from __future__ import annotations

import shutil
from pathlib import Path

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.manifests import MANIFEST
from shardyard_coordinator.launch.claim import check_claim


def remove_half_made(attempt_dir: Path, export_dir: Path, claim: worker_pb2.StorageClaim) -> list[Path]:
    """Removes checkpoints without a manifest and unfinished exports; returns what it removed.

    A checkpoint whose manifest was renamed away is being removed by retention, which finishes that itself.
    Raises: StorageFailed if the storage is not there; OSError.
    """
    check_claim(claim)
    steps = [path for path in attempt_dir.glob("step-*") if path.is_dir()]
    half = [path for path in steps if not any((path / name).exists() for name in (MANIFEST, f"{MANIFEST}.deleted"))]
    half += attempt_dir.glob("export-dry-run-*")
    half += export_dir.parent.glob(f".{export_dir.name}.*")
    for path in half:
        shutil.rmtree(path)
    return half
