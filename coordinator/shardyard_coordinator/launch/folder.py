"""The folder of an attempt: the launch makes it, and nobody else."""

from __future__ import annotations

from pathlib import Path

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.claim import check_claim


def make_attempt_folder(spec: worker_pb2.AttemptSpec) -> Path:
    """Makes the job's folder, the attempt's in it, and `logs` in that; their parent has to be there.

    Raises: StorageFailed if the storage is not mounted; OSError.
    """
    if spec.locations.HasField("claim"):
        check_claim(spec.locations.claim)
    folder = Path(spec.attempt_dir)
    for each in (folder.parent, folder, folder / "logs"):
        each.mkdir(exist_ok=True, mode=0o700)
    return folder
