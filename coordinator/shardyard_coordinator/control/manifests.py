"""The checkpoints that are on the storage, by their manifests: the rename of `manifest.json` was the commit."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import CheckpointRecord, CheckpointState

MANIFEST = "manifest.json"
_ATTEMPT = re.compile(r"e(\d{6})")
_STEP = re.compile(r"step-(\d{9})")
_MAX_BYTES = 16 << 20
_log = logging.getLogger(__name__)


def find_checkpoints(job_dir: Path, job_uid: str, below_epoch: int) -> list[CheckpointRecord]:
    """Every committed checkpoint of the job's attempts under `below_epoch`; incomplete ones are skipped."""
    found = []
    for folder in sorted(job_dir.glob(f"e*/step-*/{MANIFEST}")):
        attempt, step = _ATTEMPT.fullmatch(folder.parts[-3]), _STEP.fullmatch(folder.parts[-2])
        if attempt is None or step is None or int(attempt[1]) >= below_epoch:
            continue
        record = _read(folder, job_uid, int(attempt[1]), int(step[1]))
        if record is not None:
            found.append(record)
    return found


def _read(path: Path, job_uid: str, epoch: int, step: int) -> CheckpointRecord | None:
    try:
        if not path.is_file():  # Reading a pipe would wait forever.
            raise ValueError("it is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        manifest = json.loads(path.read_bytes())
        _verify(manifest, job_uid, epoch, step)
        return _record(path, manifest, job_uid, epoch, step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("%s is not a manifest: %s", path, error)
        return None


def _record(path: Path, manifest: dict[str, Any], job_uid: str, epoch: int, step: int) -> CheckpointRecord:
    metrics = {str(name): float(value) for name, value in (manifest.get("metrics") or {}).items()}
    return CheckpointRecord(
        job_uid=job_uid,
        epoch=epoch,
        step=step,
        state=CheckpointState.COMMITTED,
        path=str(path.parent),
        size_bytes=int(manifest["size_bytes"]),
        workers=int(manifest["world_size"]),
        metrics=job_pb2.Evaluation(step=step, metrics=metrics).SerializeToString() if metrics else b"",
        create_us=int(manifest["created_us"]),
    )


def _verify(manifest: dict[str, Any], job_uid: str, epoch: int, step: int) -> None:
    """Raises: ValueError unless the manifest is complete and describes this checkpoint."""
    if not isinstance(manifest, dict):
        raise ValueError("it is not an object")
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    # With or without ASCII escapes it is the same manifest.
    texts = (text, json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
    if manifest.get("sha256") not in {hashlib.sha256(each.encode()).hexdigest() for each in texts}:
        raise ValueError("its sha256 differs")
    if (manifest["job_uid"], manifest["epoch"], manifest["step"]) != (job_uid, epoch, step):
        raise ValueError("it belongs to another checkpoint")
