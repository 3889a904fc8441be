"""One live attempt, followed from its launch to its end.

Silence is never taken for death: only the word of the launcher that a supervisor is gone, or that the cluster is
another one, ends an attempt; anything else is the condition UNREACHABLE, and the question is repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control import ending
from shardyard_coordinator.control.attempt_spec import build_launch, export_dir
from shardyard_coordinator.control.contact import Contact, Silence, record_answer, record_silence
from shardyard_coordinator.control.copying import copies_model
from shardyard_coordinator.control.leftovers import remove_half_made
from shardyard_coordinator.control.manifests import find_checkpoints
from shardyard_coordinator.control.orders import Order, Orders
from shardyard_coordinator.control.recorder import Recorder
from shardyard_coordinator.control.recording import Recorded, read_events, record_checkpoint, record_events
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.control.starts import Starts
from shardyard_coordinator.control.storage import hide_root, probe, storage_failure
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.records import AttemptRecord, CheckpointRecord, JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.launch.claim import check_claim
from shardyard_coordinator.launch.protocols import (
    AttemptKey,
    ClusterView,
    Launch,
    Launcher,
    NodeGone,
    Presence,
    StorageFailed,
    Unreachable,
)
from shardyard_coordinator.launch.spool import SPOOL_NAME, read_spool
from shardyard_coordinator.seams import SYSTEM, Clock, Trace
from shardyard_coordinator.store import attempts, events, jobs
from shardyard_coordinator.store.store import Store

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Follower:
    """See the module. `run` returns when the attempt has ended and nothing of it is left."""

    def __init__(
        self,
        key: AttemptKey,
        store: Store,
        launcher: Launcher,
        clock: Clock,
        trace: Trace,
        *,
        recorder: Recorder,
        starts: Starts,
        settings: ControlSettings,
        rng: random.Random,
    ) -> None:
        self.key = key
        self._store = store
        self._launcher = launcher
        self._clock = clock
        self._trace = trace
        self._settings = settings
        self._rng = rng
        self._recorder = recorder
        self._starts = starts
        self._wake = asyncio.Event()
        # Job and attempt as last recorded or read; None when another actor may have changed them.
        self._known: tuple[JobRecord, AttemptRecord] | None = None
        self._changes = 0
        self._after = 0
        self._orders = Orders(clock, settings)
        self._contact = Contact(launcher, settings, clock, self._record_contact)

    def wake(self) -> None:
        """The job or the attempt has changed: look at them now."""
        self._changes += 1
        self._known = None
        self._wake.set()

    async def run(self) -> None:
        """Follows the attempt to its end; StaleWrite only if another coordinator owns the attempt."""
        if await self._launch():
            await self._follow()
        await self._release()

    async def _launch(self) -> bool:
        """Makes sure that the gang is there; False: the attempt has ended."""
        job, attempt = await self._store.read(self._load)
        self._after = attempt.high_water
        self._contact.take_up(job)  # Recorded by an earlier process; this one takes it back.
        if attempt.state is AttemptState.ENDED:
            return False
        paused_us = await self._store.read(lambda conn: events.time_in_state(conn, job.uid, JobState.PAUSED))
        self._orders.paused_s = paused_us / 1e6
        self._orders.watch(job, attempt)
        if attempt.state is not AttemptState.STARTING:
            return True
        if await self._contact.reach(lambda: self._launcher.lookup(self.key)) is Presence.DEAD:
            return True  # The next poll finds it lost.
        if job.state in (JobState.CANCELLING, JobState.PAUSING):
            return True
        try:
            launch = await self._prepare(job)
            await self._contact.reach(lambda: self._ensure(launch))
        except Refused as refused:
            if refused.retry_after_s is not None:  # A problem of the store, not of the job.
                raise
            await self._lose(job_pb2.FailureReport(reason=Cause.DATA_NOT_FOUND.value, message=refused.message))
            return False
        except StorageFailed as failed:
            await self._lose(storage_failure(failed))
            return False
        except NodeGone as gone:
            await self._lose(job_pb2.FailureReport(reason=Cause.NODE_LOST.value, message=str(gone)))
            return False
        if self._is_elsewhere(attempt, await self._contact.view()):
            await self._lose(job_pb2.FailureReport(reason=Cause.RAY_LOST.value))
            return False
        self._trace.point("attempt.launched")
        with contextlib.suppress(StaleWrite):
            await self._write(self._confirm)
            self._trace.point("attempt.confirmed")
        return True

    async def _ensure(self, launch: Launch) -> None:
        """Launches, unless the job was cancelled or paused meanwhile, or the nodes are gone."""
        job, attempt = await self._store.read(self._load)
        if job.state is JobState.PREPARING and not self._is_elsewhere(attempt, await self._contact.look()):
            await self._launcher.ensure(launch)

    def _is_elsewhere(self, attempt: AttemptRecord, view: ClusterView) -> bool:
        """Whether the attempt was given to a cluster that is gone; a local gang has none."""
        known = bool(attempt.cluster_id) and self._launcher.name != "local"
        return known and attempt.cluster_id != view.cluster_id

    def _load(self, conn: Connection) -> tuple[JobRecord, AttemptRecord]:
        job = jobs.get_job_by_uid(conn, self.key.job_uid)
        attempt = attempts.require_attempt(conn, self.key.job_uid, self.key.epoch)
        if job is None:
            raise StaleWrite(f"job {self.key.job_uid} is gone")
        return job, attempt

    async def _prepare(self, job: JobRecord) -> Launch:
        """Checkpoints on the storage without a row are recorded first: they are resume points too."""
        view = await self._contact.view()
        await asyncio.to_thread(check_claim, self._settings.claim)
        found = await asyncio.to_thread(
            find_checkpoints, self._settings.job_dir(job.uid), job.uid, below_epoch=self.key.epoch
        )
        if found:
            await self._write(lambda conn: self._record_found(conn, found))

        def build(conn: Connection) -> Launch:
            return build_launch(conn, *self._load(conn), view, self._settings)

        return await self._store.read(build)

    def _record_found(self, conn: Connection, found: Sequence[CheckpointRecord]) -> None:
        for record in sorted(found, key=lambda each: (each.step, each.epoch)):
            job, _ = self._load(conn)
            record_checkpoint(conn, job, record, self._clock.now_us())

    def _confirm(self, conn: Connection) -> None:
        job, attempt = self._load(conn)
        if attempt.state is AttemptState.STARTING and job.state is JobState.PREPARING:
            attempts.move_attempt(conn, job, attempt, AttemptState.ACTIVE, now_us=self._clock.now_us())

    async def _follow(self) -> None:
        """Reads events and follows intentions until the attempt has ended."""
        poll: asyncio.Task[list[bytes]] | None = None
        try:
            while True:
                if await self._heed():
                    return
                poll = poll or asyncio.create_task(self._poll())
                await self._wait_for(poll)
                if not poll.done():
                    continue
                done, poll = poll, None
                try:
                    batch = done.result()
                except LookupError:
                    if await self._gone():
                        return
                    continue
                if batch and await self._record(batch):
                    return
        finally:
            if poll is not None:
                poll.cancel()
                # Not awaited itself: its cancellation could not be distinguished from a cancellation of this task.
                await asyncio.wait({poll})
                if not poll.cancelled():
                    poll.exception()  # Events of the last moment are read again.

    async def _wait_for(self, poll: asyncio.Task[list[bytes]]) -> None:
        """Until there are events, the job changes, or a deadline passes."""
        if poll.done() or self._wake.is_set():
            self._wake.clear()
            return
        woken = asyncio.create_task(self._wake.wait())
        next_s = self._orders.next_s
        timeout = None if next_s is None else max(next_s - self._clock.monotonic_s(), 0.0) + 0.01
        try:
            await asyncio.wait({poll, woken}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        self._wake.clear()

    async def _poll(self) -> list[bytes]:
        settings = self._settings
        return await self._contact.reach(
            lambda: self._launcher.events_after(
                self.key, self._after, timeout_s=settings.poll_s, limit=settings.events_per_poll
            )
        )

    async def _record(self, batch: Sequence[bytes]) -> bool:
        """Records a batch; True when the attempt has ended with it."""
        self._trace.point("events.read")
        reported = read_events(batch, self._after, storage=self._settings.storage)

        def record(conn: Connection) -> Recorded:
            recorded = record_events(
                conn, self.key.job_uid, self.key.epoch, reported, trace=self._trace, now_us=self._clock.now_us()
            )
            if recorded.ended is not None:
                self._end(conn, ok=recorded.ended.ok)
            self._trace.point("events.inserted")
            return recorded

        changes = self._changes
        recorded = await self._write(record, sum(map(len, batch)), together=True)
        if self._changes == changes:
            self._known = recorded.job, recorded.attempt
        self._starts.hear(reported)
        self._trace.point("events.committed")
        self._after = max(self._after, recorded.attempt.high_water)
        self._trace.point("events.acked")
        if recorded.ended is not None:
            self._trace.point("terminal.committed")
            return True
        self._orders.watch(recorded.job, recorded.attempt)
        return False

    async def _heed(self) -> bool:
        """Carries out what the job asks of its gang; True when the attempt has ended."""
        job, attempt = await self._current()
        if attempt.state is AttemptState.ENDED:
            return True
        if self._orders.must_end(job, attempt):
            await self._end_by_force()
            return True
        order = self._orders.due(job, attempt)
        if order is not None:
            await self._give(order, attempt)
        return False

    async def _current(self) -> tuple[JobRecord, AttemptRecord]:
        """The current job and attempt: read again only if another actor may have changed them."""
        while self._known is None:
            changes = self._changes
            found = await self._store.read(self._load)
            if self._changes == changes:
                self._known = found
                self._orders.watch(*found)  # Its limits may have been updated.
        return self._known

    async def _give(self, order: Order, attempt: AttemptRecord) -> None:
        await self._write(
            lambda conn: ending.stop_attempt(conn, self.key.job_uid, self.key.epoch, order.reason, self._clock.now_us())
        )
        self._orders.give(order, attempt)
        directive = worker_pb2.Directive(action=order.action, reason=order.reason)
        with contextlib.suppress(LookupError, Unreachable):
            # If it does not arrive, the gang is ended by force.
            await self._launcher.direct(self.key, directive.SerializeToString())

    async def _gone(self) -> bool:
        """The supervisor is unknown: reads what it had spooled, then the attempt is lost. True: it has ended."""
        presence = await self._contact.reach(lambda: self._launcher.lookup(self.key))
        view = await self._contact.view()
        if presence is Presence.ALIVE:
            return False
        job, attempt = await self._store.read(self._load)
        was_launched = presence is not Presence.ABSENT or attempt.high_water
        if not was_launched and job.state in (JobState.PAUSING, JobState.CANCELLING):
            await self._end_by_force()  # Nothing is lost.
            return True
        while left := await asyncio.to_thread(self._read_spool):
            before = self._after
            if await self._record(left):
                return True
            if self._after == before:
                break
        await self._lose(await self._why_gone(view, presence))
        return True

    async def _why_gone(self, view: ClusterView, presence: Presence) -> job_pb2.FailureReport:
        job, attempt = await self._store.read(self._load)
        if self._is_elsewhere(attempt, view):
            return job_pb2.FailureReport(reason=Cause.RAY_LOST.value)
        # A supervisor that cannot spool ends without a word.
        folder = self._settings.attempt_dir(self.key.job_uid, self.key.epoch)
        try:
            await asyncio.to_thread(probe, folder, self._settings.claim)
        except StorageFailed as failed:
            return storage_failure(failed)
        if presence is Presence.ABSENT and (self._launcher.name == "local" or copies_model(job)):
            # Stopping the service is not a failure of the job, and does not use up its retries.
            text = "the gang ended with the coordinator that ran it"
            return job_pb2.FailureReport(reason=Cause.DRAINED.value, message=text)
        node = attempt.placement[0][0] if attempt.placement else ""
        if self._launcher.name != "local" and node and all(each.id != node for each in view.nodes):
            text = f"node {node} is gone, and with it the gang's supervisor"
            return job_pb2.FailureReport(reason=Cause.NODE_LOST.value, message=text)
        text = "the gang ended with its supervisor"
        return job_pb2.FailureReport(reason=Cause.WORKER_LOST.value, message=text)

    def _read_spool(self) -> list[bytes]:
        folder = self._settings.attempt_dir(self.key.job_uid, self.key.epoch)
        return read_spool(folder / SPOOL_NAME, self._after, self._settings.events_per_poll)

    async def _lose(self, failure: job_pb2.FailureReport) -> None:
        hide_root(failure, self._settings.storage)
        await self._write(
            lambda conn: ending.lose_attempt(conn, self.key.job_uid, self.key.epoch, failure, self._clock.now_us())
        )
        await self._end_by_force()

    async def _end_by_force(self) -> None:
        """Ends what is left of the gang; the attempt ends once that is confirmed."""
        await self._contact.reach(lambda: self._launcher.kill(self.key))
        with contextlib.suppress(StaleWrite):
            await self._write(lambda conn: self._end(conn, ok=False))
            self._trace.point("terminal.committed")

    def _end(self, conn: Connection, *, ok: bool) -> JobRecord:
        return ending.end_attempt(
            conn, self.key.job_uid, self.key.epoch, ok=ok, rng=self._rng, now_us=self._clock.now_us()
        )

    async def _release(self) -> None:
        """Ends the supervisor: all of its events are recorded."""
        await self._contact.reach(lambda: self._launcher.kill(self.key), tell=False)
        await self._remove_half_made()
        await self._write(lambda conn: attempts.release_attempt(conn, self.key.job_uid, self.key.epoch))

    async def _remove_half_made(self) -> None:
        job, attempt = await self._store.read(self._load)
        folder = self._settings.attempt_dir(job.uid, attempt.epoch)
        try:
            result = await self._store.read(lambda conn: export_dir(conn, job, attempt, self._settings))
        except Refused:
            return  # A model that has been deleted meanwhile, with everything in it.
        try:
            await asyncio.to_thread(remove_half_made, folder, Path(result), self._settings.claim)
        except (OSError, StorageFailed) as error:
            _log.warning("incomplete files of attempt %s of job %s were not removed: %s", attempt.epoch, job.uid, error)

    async def _record_contact(self, *, lost: bool, message: str) -> None:
        self._orders.reached(reached=not lost)
        with contextlib.suppress(StaleWrite):
            silence, now_us = Silence(message, self._contact.heard_us), self._clock.now_us()
            if lost:
                await self._write(lambda conn: record_silence(conn, *self._load(conn), silence, now_us))
            else:
                await self._write(lambda conn: record_answer(conn, *self._load(conn), now_us))

    async def _write(self, operation: Callable[[Connection], _T], size_bytes: int = 0, *, together: bool = False) -> _T:
        """Writes, and retries while the store is full or busy, so that no report of a gang is lost."""
        while True:
            try:
                if together:
                    return await self._recorder.record(operation, size_bytes)
                written = await self._store.write(operation, SYSTEM, size_bytes)
                self._known = None
                return written
            except Refused as refused:
                if refused.retry_after_s is None:
                    raise
                await asyncio.sleep(min(refused.retry_after_s, self._settings.retry_max_s))
