"""The state of the storage, for people: available, full, or unusable. It never names a path."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from shardyard.v1 import server_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.protocols import StorageFailed
from shardyard_coordinator.serve.uploads import SPARE_BYTES


class StorageLook:
    """Looks at the storage in a thread, one at a time: a mount that hangs takes one thread and delays no caller."""

    def __init__(self, storage: Path, claim: worker_pb2.StorageClaim, *, wait_s: float = 1.0) -> None:
        self._storage = storage
        self._claim = claim
        self._wait_s = wait_s
        self._looking: asyncio.Task[pb.StorageInfo] | None = None

    async def info(self) -> pb.StorageInfo:
        """Its current state; UNAVAILABLE if that is not known within `wait_s`."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(asyncio.to_thread(_look, self._storage, self._claim))
        looking = self._looking
        await asyncio.wait({looking}, timeout=self._wait_s)
        if not looking.done():
            return _unavailable(f"it does not answer within {self._wait_s:g} s; check its mount and its server")
        return looking.result()


def _look(storage: Path, claim: worker_pb2.StorageClaim) -> pb.StorageInfo:
    try:
        check_claim(claim)
        found = os.statvfs(storage)
    except StorageFailed:
        return _unavailable("it is not mounted, or cannot be read; mount it again")
    except OSError as error:
        return _unavailable(f"it cannot be read ({error.strerror}); check its mount and its disk")
    free = found.f_bavail * found.f_frsize
    if found.f_flag & os.ST_RDONLY:
        return _unavailable("it is read-only; make it writable", free)
    if free <= SPARE_BYTES:
        text = "it has no room; make space, or delete models, data sets and jobs that are not needed"
        return pb.StorageInfo(state=pb.StorageInfo.STATE_FULL, free_bytes=free, message=text)
    return pb.StorageInfo(state=pb.StorageInfo.STATE_AVAILABLE, free_bytes=free)


def _unavailable(message: str, free_bytes: int = 0) -> pb.StorageInfo:
    return pb.StorageInfo(state=pb.StorageInfo.STATE_UNAVAILABLE, free_bytes=free_bytes, message=message)
