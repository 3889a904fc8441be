"""Why a rank fails, as a report with a cause and a next step (docs/states.md lists the causes).

RunFailed            the trainer itself says why the run cannot continue
SpecError, DataError the user's spec or data (`data.errors`)
anything else        by its type: out of memory, a full disk, a lost peer, unknown
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Mapping

from shardyard.v1 import job_pb2
from shardyard_trainer.data.errors import DataError, SpecError

LOG_TAIL_LINES = 50
ROOM_STEP = "free space on the storage (delete jobs, models and data sets that are not needed), or raise its quota"

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
# A file system that fails or is no longer mounted, for any of its files.
FAILING = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO, errno.EUCLEAN}
# Of a file that the storage must have: its file system is no longer mounted.
GONE = {errno.ENOENT, errno.ETIMEDOUT, errno.EHOSTDOWN}
_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo", "socket")


class RunFailed(Exception):
    """The run cannot continue. `cause` is one of docs/states.md; `message` says what, `next_step` what to do."""

    def __init__(self, cause: str, message: str, next_step: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message
        self.next_step = next_step
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[type, tuple[str, str, str, dict[str, str]]]:
        """Crosses ranks: an exception is otherwise rebuilt from its text alone."""
        return type(self), (self.cause, self.message, self.next_step, self.metadata)


def failure_report(
    error: BaseException, *, attempt: int, rank: int, step: int | None, phase: str
) -> job_pb2.FailureReport:
    """The report of what ended this rank; `step` is the newest step made, None before the first."""
    cause, message, next_step, metadata = _explain(error)
    if phase == "exporting" and cause in {"UNKNOWN", "USER_CONFIG"}:
        cause, next_step = "EXPORT_FAILED", "the final checkpoint is kept; see the rank's log"
    tail = "".join(traceback.format_exception(error)).splitlines()[-LOG_TAIL_LINES:]
    report = job_pb2.FailureReport(
        reason=cause,
        message=message,
        next_step=next_step,
        attempt=attempt,
        rank=rank,
        log_tail="\n".join(tail),
        metadata=metadata,
    )
    if step is not None:
        report.step = step
    return report


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed: then another rank is to blame, and this one only died of it."""
    import torch  # Heavy; this module is also imported if nothing has been loaded yet.

    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_PEER)
    )


def storage_failure(error: OSError, what: str, *, on_storage: bool = False) -> RunFailed | None:
    """The failure of a disk that is full, read-only, failing or gone; None for any other error.

    `on_storage`: `what` belongs to the storage root, so that every error is the storage's, also a missing folder.
    """
    where = error.filename or what
    of_file = f"{error.filename}: " if error.filename else ""
    if error.errno in FULL:
        return RunFailed(
            "STORAGE_FULL",
            f"{what} could not be written: {of_file}{error.strerror or 'no space left'}",
            ROOM_STEP,
            {"path": str(where), "errno": errno.errorcode[error.errno or errno.ENOSPC]},
        )
    if error.errno in FAILING or (on_storage and error.errno in GONE):
        return RunFailed(
            "STORAGE_UNAVAILABLE",
            f"{what} could not be read or written: {of_file}{error.strerror or error}",
            "check that the storage root is mounted and its disk is sound",
            {"path": str(where), "errno": errno.errorcode.get(error.errno or 0, "")},
        )
    if on_storage or error.errno in NOT_WRITABLE:
        return RunFailed(
            "STORAGE_NOT_WRITABLE",
            f"{what} could not be written: {of_file}{error.strerror or error}",
            "make the storage root writable for the workers",
            {"path": str(where)},
        )
    return None


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that another one is made of: safetensors and tokenizers, written in Rust, only say
    its number at the end of their text."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d{1,4})\)$", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _explain(error: BaseException) -> tuple[str, str, str, dict[str, str]]:
    failure = storage_failure(os_error, "a file") if (os_error := system_error(error)) else None
    match error:
        case RunFailed():
            return error.cause, error.message, error.next_step, error.metadata
        case DataError():
            return (
                "DATA_ERROR",
                _first(str(error)),
                "restore the data as it was inspected, or submit a new job with the corrected data",
                error.metadata,
            )
        case SpecError():
            return "USER_CONFIG", _first(str(error)), f"change {error.field} and submit again", error.metadata
        case MemoryError():
            return "HOST_OOM", "the process ran out of memory", _LESS_MEMORY, {}
        case _ if failure is not None:
            return failure.cause, failure.message, failure.next_step, failure.metadata
        case _ if os_error is not None and os_error.errno == errno.ENOMEM:
            return "HOST_OOM", "the process ran out of memory", _LESS_MEMORY, {}
        case ValueError():
            return "USER_CONFIG", _first(str(error)), "change the spec and submit again", {}
        case _:
            return _explain_by_torch(error)


_LESS_MEMORY = "lower optimization.micro_batch_size, use more workers, or raise parallelism.zero_stage"


def _explain_by_torch(error: BaseException) -> tuple[str, str, str, dict[str, str]]:
    import torch  # As above.

    if isinstance(error, torch.OutOfMemoryError):
        return "CUDA_OOM", _first(str(error)), _LESS_MEMORY, {}
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error).lower():
        return "HOST_OOM", _first(str(error)), _LESS_MEMORY, {}
    if is_lost_peer(error):
        return (
            "WORKER_LOST",
            "the connection to another rank was lost",
            "see the other ranks' logs; the job continues from its last checkpoint",
            {"secondary": "true"},
        )
    return (
        "UNKNOWN",
        f"{type(error).__name__}: {_first(str(error))}",
        "see the rank's log; if it comes again, report it with the log",
        {},
    )


def _first(text: str, most: int = 2000) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
