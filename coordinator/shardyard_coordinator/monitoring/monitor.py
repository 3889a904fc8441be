"""Everything that watches one coordinator, put together: the observer of calls, the metrics, and the admin port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.control.starts import Starts
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.protocols import ClusterView, Launcher
from shardyard_coordinator.monitoring import families
from shardyard_coordinator.monitoring.admin import AdminServer
from shardyard_coordinator.monitoring.calls import CallObserver
from shardyard_coordinator.monitoring.lives import Lives
from shardyard_coordinator.monitoring.registry import Metrics
from shardyard_coordinator.monitoring.sampler import Sampler, Sources
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.serve.health import Health
from shardyard_coordinator.serve.observed import NullObserver, NullSpans, Observer, Spans
from shardyard_coordinator.serve.parts import Cluster
from shardyard_coordinator.serve.server_info import VERSION
from shardyard_coordinator.serve.storage_look import StorageLook
from shardyard_coordinator.settings import Settings
from shardyard_coordinator.store.store import Store

if TYPE_CHECKING:
    from shardyard_coordinator.monitoring.job_spans import JobSpans
    from shardyard_coordinator.monitoring.tracing import Tracing

_TICK_S = 1.0


class Monitor:
    """Watches a coordinator: `start` before it serves, `open` once its store is, `quiet` before that closes.

    Without `admin_listen` nothing is counted, and without a level of `info` no call is logged: then it costs nothing.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._health: Health | None = None
        self._sampler = Sampler(VERSION, self._is_serving)
        self._metrics = Metrics(self._sampler.samples) if settings.admin_listen else None
        self._logs_calls = logging.getLogger("shardyard_coordinator").isEnabledFor(logging.INFO)
        self._admin = AdminServer(self._exposition, self._is_serving)
        self._ticking: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._job_spans: JobSpans | None = None
        self._tracing: Tracing | None = None
        if settings.otlp_endpoint:
            from shardyard_coordinator.monitoring import tracing  # It needs packages of the extra `tracing`.

            self._tracing = tracing.Tracing(settings.otlp_endpoint, VERSION)
        self.spans: Spans = self._tracing or NullSpans()
        self.observer: Observer = NullObserver()
        if self._metrics is not None or self._tracing is not None or self._logs_calls:
            self.observer = CallObserver(self._metrics, self._tracing)
        self.address = ""

    async def start(self, health: Health) -> None:
        """Opens the admin port, if there is one; `address` then says where. Raises: OSError."""
        self._health = health
        if self._metrics is None:
            return
        host, _, port = self._settings.admin_listen.rpartition(":")
        self.address = f"{host}:{await self._admin.start(self._settings.admin_host, int(port))}"
        self._ticking = asyncio.create_task(self._tick(self._metrics))
        self._metrics.begin(families.REFUSALS, Reason.INTERNAL.value)
        for state in JobState:
            if state.is_terminal:
                self._metrics.begin(families.JOBS_ENDED, state.value)

    def open(
        self,
        store: Store,
        launcher: Launcher,
        slots: Callable[[ClusterView], Awaitable[tuple[int, int]]],
        claim: worker_pb2.StorageClaim,
        starts: Starts,
    ) -> None:
        """Begins to count what happens to jobs, and to look up what Prometheus asks for."""
        if self._metrics is not None or self._logs_calls:
            self._unsubscribe = store.subscribe(Lives(self._metrics).hear)
        if self._tracing is not None:
            from shardyard_coordinator.monitoring import job_spans  # As above.

            self._job_spans = job_spans.JobSpans(store, self._tracing)
        if self._metrics is not None:
            settings = self._settings
            sources = Sources(
                store=store,
                starts=starts,
                state_dir=settings.state_dir,
                cluster=Cluster(launcher).view,
                slots=slots,
                storage=StorageLook(settings.storage, claim).info,
                now_us=self._clock.now_us,
            )
            self._sampler.open(sources)

    async def quiet(self) -> None:
        """Looks nothing up any more: the parts are about to close. The port still answers."""
        await self._sampler.close()
        if self._job_spans is not None:
            await self._job_spans.close()
            self._job_spans = None

    async def close(self) -> None:
        """Closes the admin port."""
        await self.quiet()
        if self._unsubscribe is not None:
            self._unsubscribe()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait({self._ticking})
        await self._admin.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def _is_serving(self) -> bool:
        return self._health is not None and self._health.is_serving

    async def _exposition(self) -> bytes:
        assert self._metrics is not None
        await self._sampler.refresh()
        return await asyncio.to_thread(self._metrics.exposition)

    async def _tick(self, metrics: Metrics) -> None:
        """Measures by how much a timer is late: as long, everything on the loop waits."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _TICK_S
            await asyncio.sleep(_TICK_S)
            metrics.observe(families.LOOP_LAG, max(loop.time() - due_s, 0.0))
