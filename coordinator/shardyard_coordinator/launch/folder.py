"""The folder of an attempt: the launch makes it, and nobody else."""

from __future__ import annotations

from pathlib import Path

from shardyard.v1 import plan_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.rank_env import staging_folder, temp_folder


def make_attempt_folder(spec: worker_pb2.AttemptSpec) -> Path:
    """Makes the job's folder, the attempt's in it, and `logs` in that; and what ranks write to beside it.

    Their parents have to be there.

    Raises: StorageFailed if the storage is not mounted; OSError.
    """
    if spec.locations.HasField("claim"):
        check_claim(spec.locations.claim)
    folder = Path(spec.attempt_dir)
    for each in (folder.parent, folder, folder / "logs"):
        each.mkdir(exist_ok=True, mode=0o700)
    temp = temp_folder(spec)
    made = [temp.parent, temp]
    if spec.locations.HasField("claim"):
        # Ranks may write inside it, and must not create files beside it.
        staging = staging_folder(spec)
        if spec.plan.output == plan_pb2.JOB_OUTPUT_FORMAT:
            made.append(staging.parent)  # In the folder of the model, which is there.
        made.append(staging)
    for each in made:
        each.mkdir(exist_ok=True, mode=0o700)
    return folder
