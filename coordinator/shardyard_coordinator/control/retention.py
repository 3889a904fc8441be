"""What is removed from the storage, and when: old checkpoints, deleted jobs, unfinished uploads, folders without rows.

An intention is a row before anything is unlinked, and a checkpoint's manifest goes first: from then on it is not a
resume point. A crash in between is finished by the next sweep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from pathlib import Path

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, spec_pb2
from shardyard_coordinator.control.manifests import MANIFEST
from shardyard_coordinator.control.private import tighten
from shardyard_coordinator.control.recording import append_checkpoint_event, forget_checkpoint
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.domain.records import (
    CheckpointRecord,
    CheckpointState,
    EventKind,
    EventRecord,
    ResourceKind,
    ResourceRecord,
)
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.protocols import StorageFailed
from shardyard_coordinator.seams import SYSTEM, Clock, Trace
from shardyard_coordinator.store import attempts, checkpoints, events, jobs, resources, webhooks
from shardyard_coordinator.store.store import Store

KEEP_LAST = 2
_DAY_S = 86_400.0
_SWEEP_EVERY_S = 600.0
_UID = re.compile(r"[0-9a-f]{32}")
_log = logging.getLogger(__name__)


class Retention:
    """Thins checkpoints after each new one and each update of the job, removes the files of deleted jobs, and sweeps
    every ten minutes.
    """

    def __init__(self, store: Store, clock: Clock, trace: Trace, settings: ControlSettings) -> None:
        self._store = store
        self._clock = clock
        self._trace = trace
        self._settings = settings
        self._due: set[str] = set()
        self._deleted: set[str] = set()
        self._wake = asyncio.Event()
        # Two passes at once would remove the same files.
        self._alone = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the task that removes."""
        self._task = self._task or asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops; the next start finishes interrupted removals."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def hear(self, records: Sequence[EventRecord]) -> None:
        """Notes the jobs that a commit has given something to remove."""
        due = {record.job_uid for record in records if record.kind in (EventKind.CHECKPOINT, EventKind.UPDATED)}
        gone = {record.job_uid for record in records if record.kind is EventKind.DELETED}
        if due or gone:
            self._due |= due
            self._deleted |= gone
            self._wake.set()

    async def _run(self) -> None:
        swept_s: float | None = None
        tightened = False
        while True:
            try:
                if not tightened:
                    # Files of an earlier version may be readable by others; new files are private from the start.
                    await asyncio.to_thread(tighten, self._settings.storage)
                    tightened = True
                now_s = self._clock.monotonic_s()
                if swept_s is None or now_s - swept_s >= _SWEEP_EVERY_S:
                    swept_s = now_s
                    await self.sweep()
                await self._work()
            except StorageFailed as failed:
                # A missing mount looks empty, but nothing has been removed.
                _log.warning("nothing is removed: %s", failed)
                swept_s = None  # Sweep as soon as the storage is back.
                await asyncio.sleep(self._settings.retry_max_s)
                continue
            except Exception:  # The edge of a supervised loop: a store that is full now may have room later.
                _log.exception("retention failed; it is retried")
                await asyncio.sleep(self._settings.retry_max_s)
                continue
            # Not wait_for: on Python 3.11 it can swallow a cancellation that comes at the same moment.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SWEEP_EVERY_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _work(self) -> None:
        for waiting, remove in ((self._deleted, self.remove_checkpoints_of), (self._due, self.thin)):
            while waiting:
                job_uid = waiting.pop()
                try:
                    await remove(job_uid)
                except BaseException:
                    waiting.add(job_uid)
                    raise

    @contextlib.asynccontextmanager
    async def _on_storage(self) -> AsyncIterator[None]:
        """One pass at a time, and only while the storage is mounted. Raises: StorageFailed."""
        async with self._alone:
            await asyncio.to_thread(check_claim, self._settings.claim)
            yield

    async def thin(self, job_uid: str) -> None:
        """Removes the checkpoints that a job no longer keeps: all except the newest ones and the best."""
        async with self._on_storage():
            for record in await self._store.write(lambda conn: self._choose(conn, job_uid), SYSTEM):
                await _each(self._remove(record))

    def _choose(self, conn: Connection, job_uid: str) -> list[CheckpointRecord]:
        job = jobs.get_job_by_uid(conn, job_uid)
        if job is None:
            return []
        policy = spec_pb2.JobSpec.FromString(job.resolved_spec).checkpoints
        keep = policy.keep_last if policy.HasField("keep_last") else KEEP_LAST
        chosen = [
            each
            for each in checkpoints.committed_checkpoints(conn, job_uid)[keep:]
            if job.checkpoint_name(each.epoch, each.step) != job.best_checkpoint
        ]
        for record in chosen:
            checkpoints.set_checkpoint_state(conn, record, CheckpointState.DELETING)
        return chosen

    async def _remove(self, record: CheckpointRecord) -> None:
        self._trace.point("delete.recorded")
        folder = self._settings.checkpoint_dir(record.job_uid, record.epoch, record.step)
        await asyncio.to_thread(remove_checkpoint, folder)
        self._trace.point("delete.unlinked")
        await self._store.write(lambda conn: self._removed(conn, record), SYSTEM)

    def _removed(self, conn: Connection, record: CheckpointRecord) -> None:
        found = checkpoints.get_checkpoint(conn, record.job_uid, record.epoch, record.step)
        job = jobs.get_job_by_uid(conn, record.job_uid)
        if found is None or job is None or found.state is not CheckpointState.DELETING:
            return
        checkpoints.set_checkpoint_state(conn, found, CheckpointState.DELETED)
        if job.deleted_us:
            return
        now_us = self._clock.now_us()
        if not job.state.is_terminal:  # Nothing may follow a terminal event.
            append_checkpoint_event(conn, job, found, job_pb2.CheckpointChanged.CHANGE_DELETED, now_us)
        forget_checkpoint(conn, job, found, now_us)

    async def remove_checkpoints_of(self, job_uid: str) -> None:
        """Removes the checkpoints of a deleted job at once; its logs stay until it is purged."""
        async with self._on_storage():
            await _each(self._remove_checkpoints_of(job_uid))

    async def _remove_checkpoints_of(self, job_uid: str) -> None:
        folder = self._settings.job_dir(job_uid)
        found = await asyncio.to_thread(lambda: sorted(folder.glob("e*/step-*")))
        for each in found:
            await asyncio.to_thread(remove_checkpoint, each)

    async def sweep(self) -> None:
        """Finishes interrupted removals, purges expired rows, and removes folders without a row."""
        async with self._on_storage():
            await self._sweep()

    async def _sweep(self) -> None:
        for record in await self._store.read(checkpoints.deleting_checkpoints):
            await _each(self._remove(record))
        await self._store.write(partial(webhooks.release_old, now_us=self._clock.now_us()), SYSTEM)
        old_us = self._clock.now_us() - round(self._settings.request_retention_s * 1e6)
        for job_uid, deleted_us in await self._store.read(partial(jobs.deleted_jobs, purged_before_us=old_us)):
            await _each(self._purge(job_uid, deleted_us))
        for resource in await self._store.read(resources.deleting_resources):
            await _each(self._finish_delete(resource))
        await self._sweep_uploads()
        await _each(self._sweep_folders())
        keep_s = self._settings.event_retention_s
        if keep_s:
            await self._expire(self._clock.now_us() - round(keep_s * 1e6))

    async def _purge(self, job_uid: str, deleted_us: int) -> None:
        """Removes events and logs a day after the deletion, and the row when its request id has expired."""
        await self._remove_checkpoints_of(job_uid)
        age_s = (self._clock.now_us() - deleted_us) / 1e6
        if age_s < _DAY_S:
            return
        await asyncio.to_thread(_remove_tree, self._settings.job_dir(job_uid))
        forget = jobs.purge_job if age_s >= self._settings.request_retention_s else jobs.purge_events
        while await self._store.write(lambda conn: forget(conn, job_uid), SYSTEM):
            pass  # In parts, so that other writers get their turn.

    async def _expire(self, before_us: int) -> None:
        """Removes the events of jobs that ended before that time, except each job's last, a few thousand per commit."""
        row = 0
        while found := await self._store.read_many(partial(events.expired_events, before_us=before_us, after_row=row)):
            for batch in events.in_batches(found):
                await self._store.write(partial(events.remove_events, batch=batch), SYSTEM)
            row = found[-1].row

    async def _sweep_uploads(self) -> None:
        before = self._clock.now_us() - round(self._settings.sweep_after_s * 1e6)
        for upload in await self._store.read(lambda conn: resources.stale_uploads(conn, before)):
            begin = partial(
                resources.begin_delete,
                kind=upload.kind,
                project=upload.project,
                resource_id=upload.resource_id,
                actor=SYSTEM,
                now_us=self._clock.now_us(),
            )
            await self._store.write(begin, SYSTEM)
            await _each(self._finish_delete(upload))

    async def _finish_delete(self, resource: ResourceRecord) -> None:
        await asyncio.to_thread(_remove_tree, Path(resource.path))
        await self._store.write(partial(resources.finish_delete, uid=resource.uid), SYSTEM)

    async def _sweep_folders(self) -> None:
        """Removes folders of exports, uploads and jobs without a row or a live attempt that are older than a day."""
        live = {attempt.export_uid for attempt in await self._store.read(attempts.live_attempts)}
        for kind in ResourceKind:
            folder = self._settings.storage / kind.value
            there = await asyncio.to_thread(self._old_folders, folder)
            known = await self._store.read(partial(resources.known_uids, kind=kind))
            await asyncio.to_thread(_remove_all, folder, there - known - live)
        folder = self._settings.storage / "jobs"
        there = await asyncio.to_thread(self._old_folders, folder)
        known = await self._store.read(partial(jobs.known_uids, uids=sorted(there)))
        await asyncio.to_thread(_remove_all, folder, there - known)

    def _old_folders(self, folder: Path) -> set[str]:
        """The uids that name old folders. Listed before the rows, so that a folder made in between stays."""
        if not folder.is_dir():
            return set()
        before_s = self._clock.now_us() / 1e6 - self._settings.sweep_after_s
        return {each.name for each in folder.iterdir() if _UID.fullmatch(each.name) and each.stat().st_mtime < before_s}


async def _each(removal: Coroutine[None, None, None]) -> None:
    """One removal of many: a failure leaves it to a later sweep, and does not stop the others."""
    try:
        await removal
    except OSError as error:
        _log.warning("not removed: %s", error)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, its manifest first, so that no run resumes from a partly removed one. Idempotent."""
    manifest = folder / MANIFEST
    if manifest.exists():
        manifest.rename(folder / f"{MANIFEST}.deleted")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _remove_tree(folder)


def _remove_tree(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _remove_all(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        try:
            shutil.rmtree(folder / name)
        except OSError as error:
            _log.warning("not removed: %s", error)
