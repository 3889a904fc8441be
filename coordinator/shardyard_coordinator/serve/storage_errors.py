"""Errors of the storage as refusals: full, not writable, not mounted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.protocols import StorageFailed, storage_cause

_NEXT_STEPS: Final = {
    Cause.STORAGE_FULL: "try again when the operator has made space",
    Cause.STORAGE_NOT_WRITABLE: "ask the operator to make it writable, then try again",
    Cause.STORAGE_UNAVAILABLE: "ask the operator to mount it again, then try again",
}

_WHY: Final = {
    Cause.STORAGE_FULL: "it is full",
    Cause.STORAGE_NOT_WRITABLE: "it may not be written",
    Cause.STORAGE_UNAVAILABLE: "it is not mounted, or its disk fails",
}


def refused_storage(reason: Reason) -> Refused | None:
    """The refusal for a reason about the storage; None for other reasons.

    It names no path: where the operator's disks are mounted does not concern a caller.
    """
    cause = next((cause for cause in _WHY if cause.value == reason.value), None)
    return None if cause is None else _storage_refusal(cause, _WHY[cause])


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turns errors of the storage into Refused STORAGE_FULL, STORAGE_NOT_WRITABLE or STORAGE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        raise _storage_refusal(storage_cause(error), error.strerror or "its disk fails") from error
    except StorageFailed as failed:
        raise _storage_refusal(failed.cause, "it is not mounted") from failed


async def blame_the_storage_if_away(claim: worker_pb2.StorageClaim) -> None:
    """Raises Refused STORAGE_UNAVAILABLE if the storage is not mounted: missing files are then not damaged."""
    with storage_errors():
        await asyncio.to_thread(check_claim, claim)


def _storage_refusal(cause: Cause, why: str) -> Refused:
    text = f"the storage cannot be used: {why}; {_NEXT_STEPS[cause]}"
    return Refused(Reason(cause.value), text, retry_after_s=60.0)
