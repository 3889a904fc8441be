"""Whether an attempt's folder can be written, and the failure report if it cannot."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.protocols import StorageFailed

_PROBE_BYTES = 64 * 1024
_ROOT = "<storage>"

_log = logging.getLogger(__name__)


def storage_failure(failed: StorageFailed) -> job_pb2.FailureReport:
    """The report of an attempt that could not write."""
    return job_pb2.FailureReport(reason=failed.cause.value, message=f"the attempt's folder cannot be written: {failed}")


def hide_root(report: job_pb2.FailureReport, root: Path) -> None:
    """Replaces the storage root in a report by `<storage>`: only the service's log names the operator's disks."""
    named = report.message, report.next_step, dict(report.metadata)
    report.message, report.next_step = (text.replace(str(root), _ROOT) for text in named[:2])
    for key, value in named[2].items():
        report.metadata[key] = value.replace(str(root), _ROOT)
    if named != (report.message, report.next_step, dict(report.metadata)):
        _log.warning("attempt %s failed with %s: %s %s", report.attempt, report.reason, named[0], named[2])


def probe(folder: Path, claim: worker_pb2.StorageClaim) -> None:
    """Writes into the folder (if it was never made, into the nearest above it), and leaves nothing.

    Raises: StorageFailed, also if the storage is not mounted.
    """
    check_claim(claim)
    path = next(each for each in (folder, *folder.parents) if each.exists()) / "probe"
    try:
        with path.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageFailed.of(error) from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
