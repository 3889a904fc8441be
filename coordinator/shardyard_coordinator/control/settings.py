"""Folders and timeouts for following attempts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.claim import claim_of


@dataclass(frozen=True)
class ControlSettings:
    """Folders of the storage, and durations in seconds."""

    storage: Path
    # The id of the store that the storage belongs to, as its claim says while it is mounted.
    store_id: str
    data_roots: tuple[str, ...] = ()
    # Repositories of PyTorch Hub whose code may run → their folders.
    torch_hub: Mapping[str, str] = field(default_factory=dict)
    poll_s: float = 10.0
    events_per_poll: int = 5000
    # A gang that was asked to stop is ended by force after this.
    stop_grace_s: float = 30.0
    # A gang that was asked to pause may have a long step, an evaluation and a large checkpoint before it.
    pause_grace_s: float = 600.0
    # The same before the first step: nothing has to be finished, and a rank that loads reads no directive.
    unbegun_grace_s: float = 3.0
    # From a rank's failure to the supervisor's report that the gang has ended.
    failure_grace_s: float = 30.0
    # From one report to the next between the launch and the canary: loading, tokenising and compiling included.
    start_timeout_s: float = 1800.0
    retry_min_s: float = 0.5
    retry_max_s: float = 10.0
    log_interval_s: float = 1.0
    # Uploads and folders without rows are swept when they are older than this.
    sweep_after_s: float = 86_400.0
    # 0: events are kept forever.
    event_retention_s: float = 0.0
    # A deleted job's request id is known for this long.
    request_retention_s: float = 30 * 86_400.0

    @property
    def claim(self) -> worker_pb2.StorageClaim:
        """The proof that the storage is mounted."""
        return claim_of(self.storage, self.store_id)

    @property
    def objects_dir(self) -> Path:
        """The folder for copies of objects."""
        return self.storage / "objects"

    @property
    def cache_dir(self) -> Path:
        """The folder for files that can be made again."""
        return self.storage / "cache"

    def job_dir(self, job_uid: str) -> Path:
        """A job's folder: an attempt's folder is `e{epoch:06}` in it."""
        return self.storage / "jobs" / job_uid

    def attempt_dir(self, job_uid: str, epoch: int) -> Path:
        """The folder of one attempt on the storage."""
        return self.job_dir(job_uid) / f"e{epoch:06}"

    def checkpoint_dir(self, job_uid: str, epoch: int, step: int) -> Path:
        """The folder of one checkpoint on the storage."""
        return self.attempt_dir(job_uid, epoch) / f"step-{step:09}"
