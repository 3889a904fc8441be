"""The file that says which process serves a state directory, and how it is reached: `shardyard stop` reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from shardyard_coordinator.launch.ray_head import started_at
from shardyard_coordinator.serve.first_admin import FILE
from shardyard_coordinator.settings import Settings


def write_record(path: Path, address: str, settings: Settings) -> None:
    """Writes it, complete or not at all. Raises: OSError."""
    temporary = path.with_suffix(".tmp")
    record: dict[str, object] = {
        "pid": os.getpid(),
        "start_ticks": int(started_at(os.getpid()) or 0),
        "address": address,
        "projects": list(settings.projects),
    }
    if settings.tls is not None:
        record["certificate"] = str(settings.tls.certificate.absolute())
    if settings.authentication.is_required:
        record["admin_token"] = str(settings.state_dir.absolute() / FILE)
    temporary.write_text(json.dumps(record) + "\n")
    temporary.replace(path)


def remove_record(path: Path) -> None:
    """Removes it. Idempotent."""
    path.unlink(missing_ok=True)
