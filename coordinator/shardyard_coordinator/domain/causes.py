"""Why an attempt ended, and what follows: one enum, one table (docs/states.md)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Cause(StrEnum):
    """Why an attempt ended; the reason in a FailureReport."""

    CUDA_OOM = "CUDA_OOM"
    HOST_OOM = "HOST_OOM"
    LOSS_DIVERGED = "LOSS_DIVERGED"
    ENGINE_START_TIMEOUT = "ENGINE_START_TIMEOUT"
    DATA_ERROR = "DATA_ERROR"
    DATA_NOT_FOUND = "DATA_NOT_FOUND"
    DATA_CHANGED = "DATA_CHANGED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_CHANGED = "MODEL_CHANGED"
    USER_CONFIG = "USER_CONFIG"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    MAX_RUN_TIME = "MAX_RUN_TIME"
    MAX_QUEUE_TIME = "MAX_QUEUE_TIME"
    HUNG = "HUNG"
    NCCL_TIMEOUT = "NCCL_TIMEOUT"
    WORKER_LOST = "WORKER_LOST"
    NODE_LOST = "NODE_LOST"
    RAY_LOST = "RAY_LOST"
    PREEMPTED = "PREEMPTED"
    DRAINED = "DRAINED"
    GPU_FAULT = "GPU_FAULT"
    CHECKPOINT_CORRUPT = "CHECKPOINT_CORRUPT"
    STORAGE_FULL = "STORAGE_FULL"
    STORAGE_NOT_WRITABLE = "STORAGE_NOT_WRITABLE"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    EXPORT_FAILED = "EXPORT_FAILED"
    EXPORT_REFUSED = "EXPORT_REFUSED"
    OBJECT_EXISTS = "OBJECT_EXISTS"
    OBJECT_NOT_FOUND = "OBJECT_NOT_FOUND"
    OBJECT_STORE_REFUSED = "OBJECT_STORE_REFUSED"
    OBJECT_STORE_UNREACHABLE = "OBJECT_STORE_UNREACHABLE"
    SECRET_UNUSABLE = "SECRET_UNUSABLE"
    UNKNOWN = "UNKNOWN"


class Blame(StrEnum):
    """Who or what is responsible for a failure."""

    USER = "user"
    SPEC = "spec"
    PLATFORM = "platform"
    HARDWARE = "hardware"
    STORAGE = "storage"


@dataclass(frozen=True)
class Verdict:
    """What follows from a cause.

    `retries` is how often in a row the job is retried after the cause (None: always while checkpoints are made in
    between, `retries_without_progress` times otherwise). The back-off before try n is drawn from
    0 to `backoff_s` × 2ⁿ, at most `backoff_max_s` (full jitter).

    `needs_person`: when the retries are used up, a person can fix it outside the job: the job is paused, not failed.
    `may_pass`: time or another node may fix it, so the same failure at the same step may not happen again.
    """

    blame: Blame
    retries: int | None
    backoff_s: float = 0.0
    needs_person: bool = False
    may_pass: bool = False
    retries_without_progress: int = 5
    backoff_max_s: float = 300.0

    def may_retry(self, failures_in_row: int, *, made_progress: bool) -> bool:
        """Whether the cause may be tried again after it has now happened `failures_in_row` times in a row."""
        if self.retries is None:
            return made_progress or failures_in_row <= self.retries_without_progress
        return failures_in_row <= self.retries

    def backoff(self, failures_in_row: int, rng: random.Random) -> float:
        """Seconds to wait before the next try."""
        return rng.uniform(0, min(self.backoff_s * 2.0 ** max(failures_in_row - 1, 0), self.backoff_max_s))


_NEVER = Verdict(Blame.USER, 0)
_PERSON = Verdict(Blame.USER, 0, needs_person=True)
_LOST = Verdict(Blame.PLATFORM, None, 5.0, may_pass=True)
_FREE = Verdict(Blame.PLATFORM, None, 0.0, may_pass=True, retries_without_progress=1_000_000)

VERDICTS: Mapping[Cause, Verdict] = MappingProxyType(
    {
        Cause.CUDA_OOM: Verdict(Blame.SPEC, 0),
        Cause.HOST_OOM: Verdict(Blame.SPEC, 1, 5.0),
        Cause.LOSS_DIVERGED: Verdict(Blame.SPEC, 0),
        Cause.ENGINE_START_TIMEOUT: Verdict(Blame.PLATFORM, 2, 10.0),
        Cause.DATA_ERROR: _PERSON,
        Cause.DATA_NOT_FOUND: _PERSON,
        Cause.DATA_CHANGED: _PERSON,
        Cause.MODEL_NOT_FOUND: _PERSON,
        Cause.MODEL_CHANGED: _PERSON,
        Cause.USER_CONFIG: _NEVER,
        Cause.VERSION_MISMATCH: _NEVER,
        Cause.MAX_RUN_TIME: _NEVER,
        Cause.MAX_QUEUE_TIME: _NEVER,
        Cause.HUNG: Verdict(Blame.PLATFORM, 3, 10.0, may_pass=True),
        Cause.NCCL_TIMEOUT: Verdict(Blame.PLATFORM, 3, 10.0, may_pass=True),
        Cause.WORKER_LOST: _LOST,
        Cause.NODE_LOST: _LOST,
        Cause.RAY_LOST: _LOST,
        Cause.PREEMPTED: _FREE,
        Cause.DRAINED: _FREE,
        Cause.GPU_FAULT: Verdict(Blame.HARDWARE, 3, may_pass=True),
        Cause.CHECKPOINT_CORRUPT: Verdict(Blame.STORAGE, 0, needs_person=True),
        # About 15 minutes to make room; then a person has to act.
        Cause.STORAGE_FULL: Verdict(Blame.STORAGE, 8, 30.0, needs_person=True, may_pass=True),
        Cause.STORAGE_NOT_WRITABLE: Verdict(Blame.STORAGE, 3, 10.0, needs_person=True, may_pass=True),
        Cause.STORAGE_UNAVAILABLE: Verdict(Blame.STORAGE, 3, 10.0, needs_person=True, may_pass=True),
        Cause.EXPORT_FAILED: Verdict(Blame.PLATFORM, 3, 10.0, needs_person=True),
        Cause.EXPORT_REFUSED: _NEVER,
        Cause.OBJECT_EXISTS: _NEVER,
        Cause.OBJECT_NOT_FOUND: _NEVER,
        Cause.OBJECT_STORE_REFUSED: Verdict(Blame.STORAGE, 0),
        Cause.OBJECT_STORE_UNREACHABLE: Verdict(Blame.STORAGE, 5, 10.0, may_pass=True),
        Cause.SECRET_UNUSABLE: Verdict(Blame.PLATFORM, 0),
        Cause.UNKNOWN: Verdict(Blame.PLATFORM, 2, 30.0),
    }
)
