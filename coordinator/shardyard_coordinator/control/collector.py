"""A follower for each live attempt, woken when its job changes; one that fails is started again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from shardyard_coordinator.control.follower import Follower
from shardyard_coordinator.control.recorder import Recorder
from shardyard_coordinator.control.retention import Retention
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.control.starts import Starts
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.launch.protocols import AttemptKey, Launcher
from shardyard_coordinator.log_context import logged_about
from shardyard_coordinator.seams import Clock, Trace
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
# Events of changes by other actors: a follower then reads its job and attempt again.
_HEEDED = frozenset({EventKind.STATE, EventKind.ATTEMPT, EventKind.DELETED, EventKind.UPDATED})


class Collector:
    """Follows attempts. `retention` thins a job's checkpoints after each new one; `rng` draws the back-offs.

    `starts` counts how their ranks have started.
    """

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        clock: Clock,
        trace: Trace,
        settings: ControlSettings,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self.retention = Retention(store, clock, trace, settings)
        self._store = store
        self._launcher = launcher
        self._clock = clock
        self._trace = trace
        self._rng = rng or random.Random()
        self._recorder = Recorder(store)
        self.starts = Starts()
        self._by_job: dict[str, set[Follower]] = {}
        self._tasks: dict[AttemptKey, asyncio.Task[None]] = {}
        self._unsubscribe = store.subscribe(self._hear)

    def follow(self, key: AttemptKey) -> None:
        """Begins to follow a recorded attempt; does nothing if it is followed already."""
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._run(key))

    @property
    def following(self) -> frozenset[AttemptKey]:
        """The attempts that are followed now."""
        return frozenset(self._tasks)

    async def close(self) -> None:
        """Stops following; the gangs continue."""
        self._unsubscribe()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.retention.close()

    async def _run(self, key: AttemptKey) -> None:
        try:
            with logged_about(job_uid=key.job_uid, attempt=key.epoch):
                while True:
                    if await self._attend(key):
                        return
                    await asyncio.sleep(self.settings.retry_max_s)
        finally:
            self._tasks.pop(key, None)

    async def _attend(self, key: AttemptKey) -> bool:
        """True when there is nothing left to follow."""
        follower = Follower(
            key,
            self._store,
            self._launcher,
            self._clock,
            self._trace,
            recorder=self._recorder,
            starts=self.starts,
            settings=self.settings,
            rng=self._rng,
        )
        self._by_job.setdefault(key.job_uid, set()).add(follower)
        try:
            await follower.run()
        except StaleWrite as stale:
            _log.info("an attempt is not followed any more: %s", stale)
        except Exception:  # The edge of a supervised loop: a defect must not end what it follows.
            _log.exception("following attempt %s of job %s failed; it is started again", key.epoch, key.job_uid)
            return False
        finally:
            self._forget(follower)
        return True

    def _forget(self, follower: Follower) -> None:
        same = self._by_job[follower.key.job_uid]
        same.discard(follower)
        if not same:
            del self._by_job[follower.key.job_uid]

    def _hear(self, records: Sequence[EventRecord]) -> None:
        for uid in {record.job_uid for record in records if record.kind in _HEEDED}:
            for follower in self._by_job.get(uid, ()):
                follower.wake()
        self.retention.hear(records)
