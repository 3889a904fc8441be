"""A follower for each live attempt, woken when its job changes; one that fails is begun again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from shardyard_coordinator.control.follower import Follower
from shardyard_coordinator.control.retention import Retention
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.launch.protocols import AttemptKey, Launcher
from shardyard_coordinator.seams import Clock, Trace
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)


class Collector:
    """Follows attempts. `retention` thins a job's checkpoints after each new one; `rng` draws the back-offs."""

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
        self._followers: dict[AttemptKey, Follower] = {}
        self._tasks: dict[AttemptKey, asyncio.Task[None]] = {}
        self._unsubscribe = store.subscribe(self._hear)

    def follow(self, key: AttemptKey) -> None:
        """Begins to follow an attempt that is recorded; nothing where it is followed already."""
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._run(key))

    @property
    def following(self) -> frozenset[AttemptKey]:
        """The attempts that are followed now."""
        return frozenset(self._tasks)

    async def close(self) -> None:
        """Stops following; the gangs go on."""
        self._unsubscribe()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.retention.close()

    async def _run(self, key: AttemptKey) -> None:
        try:
            while True:
                if await self._attend(key):
                    return
                await asyncio.sleep(self.settings.retry_max_s)
        finally:
            self._followers.pop(key, None)
            self._tasks.pop(key, None)

    async def _attend(self, key: AttemptKey) -> bool:
        """True when there is nothing left to follow."""
        follower = Follower(
            key,
            self._store,
            self._launcher,
            self._clock,
            self._trace,
            settings=self.settings,
            rng=self._rng,
        )
        self._followers[key] = follower
        try:
            await follower.run()
        except StaleWrite as stale:
            _log.info("%s", stale)
        except Exception:  # The edge of a supervised loop: a defect must not end what it follows.
            _log.exception("following attempt %s of job %s failed; it is begun again", key.epoch, key.job_uid)
            return False
        return True

    def _hear(self, records: Sequence[EventRecord]) -> None:
        changed = {record.job_uid for record in records if record.kind is EventKind.STATE}
        for key, follower in self._followers.items():
            if key.job_uid in changed:
                follower.wake()
        self.retention.hear(records)
