"""Whether an attempt's folder can be written, and what it is called when it cannot."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from shardyard.v1 import job_pb2
from shardyard_coordinator.launch.protocols import StorageFailed

_PROBE_BYTES = 64 * 1024


def storage_failure(failed: StorageFailed) -> job_pb2.FailureReport:
    """The report of an attempt that could not write."""
    return job_pb2.FailureReport(reason=failed.cause.value, message=f"the attempt's folder cannot be written: {failed}")


def probe(folder: Path) -> None:
    """Writes into the folder, which it makes where it is not there, and leaves nothing. Raises: StorageFailed."""
    path = folder / "probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageFailed.of(error) from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
