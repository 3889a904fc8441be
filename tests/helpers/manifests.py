"""Manifests as the trainer writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def write_manifest(job_dir: Path, job_uid: str, *, step: int, epoch: int = 1, **changes: Any) -> Path:
    """A manifest of an attempt's checkpoint; `changes` are made after it was signed."""
    body: dict[str, Any] = {
        "format": 1,
        "job_uid": job_uid,
        "epoch": epoch,
        "step": step,
        "world_size": 2,
        "zero_stage": 1,
        "created_us": 5,
        "size_bytes": 7,
        "files": [],
        "cursor": {},
        "metrics": {"loss": 0.5},
        "versions": {"name": "ünïcode"},
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    body.update(changes)
    path = job_dir / f"e{epoch:06}" / f"step-{step:09}" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(body))
    return path
