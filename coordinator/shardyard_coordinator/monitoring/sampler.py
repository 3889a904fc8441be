"""What Prometheus asks for and nobody counts: looked up in store, cluster and storage, at most every few seconds.

A look never takes more than a few seconds, whatever hangs; until the next one succeeds, the last numbers are served
with their age. All scrapers share one look.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardyard.v1 import server_service_pb2
from shardyard_coordinator.control.starts import Starts
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.launch.gpus import GpuUse, gpu_use
from shardyard_coordinator.launch.protocols import ClusterView
from shardyard_coordinator.monitoring import families
from shardyard_coordinator.monitoring.families import Family
from shardyard_coordinator.monitoring.registry import Samples
from shardyard_coordinator.store.census import Census, take_census
from shardyard_coordinator.store.store import Store

_log = logging.getLogger(__name__)
KEEP_S = 5.0
WAIT_S = 3.0
REST = 20.0
"""A look takes at most a twentieth of the time: the census of a large store is taken less often."""


@dataclass(frozen=True)
class Sources:
    """Where the numbers come from; `slots` answers (all, free) of a cluster, `now_us` is wall time."""

    store: Store
    starts: Starts
    state_dir: Path
    cluster: Callable[[], Awaitable[ClusterView]]
    slots: Callable[[ClusterView], Awaitable[tuple[int, int]]]
    storage: Callable[[], Awaitable[server_service_pb2.StorageInfo]]
    now_us: Callable[[], int]


class Sampler:
    """Looks the numbers up. `samples` are those of the last look, and what can be read at once."""

    def __init__(
        self,
        version: str,
        is_serving: Callable[[], bool],
        *,
        keep_s: float = KEEP_S,
        wait_s: float = WAIT_S,
        rest: float = REST,
    ) -> None:
        self._keep_s = keep_s
        self._rest = rest
        self._wait_s = wait_s
        self._version = version
        self._is_serving = is_serving
        self._sources: Sources | None = None
        self._looking: asyncio.Task[None] | None = None
        self._seen: dict[Family, list[tuple[tuple[str, ...], float]]] = {}
        self._looked_s: float | None = None
        self._next_s = 0.0

    def open(self, sources: Sources) -> None:
        """Gives it the parts of the service, once they are there."""
        self._sources = sources

    async def close(self) -> None:
        """Ends a look that is being made; the parts are about to close."""
        self._sources = None
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def refresh(self) -> None:
        """Looks again if the last look is old; waits a few seconds at most."""
        if self._looking is None and self._sources is not None and time.monotonic() >= self._next_s:
            self._looking = asyncio.create_task(self._look(self._sources))
        if self._looking is not None:
            await asyncio.wait({self._looking}, timeout=self._wait_s)

    def samples(self) -> Samples:
        """The numbers of the last look, with their age."""
        at_once: dict[Family, list[tuple[tuple[str, ...], float]]] = {
            families.INFO: [((self._version,), 1.0)],
            families.SERVING: [((), float(self._is_serving()))],
        }
        if self._looked_s is not None:
            at_once[families.CENSUS_AGE] = [((), time.monotonic() - self._looked_s)]
        if (sources := self._sources) is not None:
            at_once.update(_writer(sources.store))
            at_once[families.RANKS_STARTED] = [(("warm",), sources.starts.warm), (("cold",), sources.starts.cold)]
        return {**self._seen, **at_once}

    async def _look(self, sources: Sources) -> None:
        begun_s = time.monotonic()
        try:
            view = await sources.cluster()
            census = await sources.store.read_many(take_census)
            slots, free = await sources.slots(view)
            seen = {**_of_census(census, sources.now_us()), **_of_cluster(view, slots, free)}
            seen.update(_of_storage(await sources.storage()))
            seen.update(await asyncio.to_thread(_of_disk_and_gpus, sources.store.file, sources.state_dir))
            self._seen, self._looked_s = seen, time.monotonic()
        except (Refused, OSError) as error:
            _log.warning("the numbers for monitoring could not be looked up: %s", error)
        finally:
            self._looking = None
            self._next_s = time.monotonic() + max(self._keep_s, self._rest * (time.monotonic() - begun_s))


def _one(value: float) -> list[tuple[tuple[str, ...], float]]:
    return [((), float(value))]


_Seen = dict[Family, list[tuple[tuple[str, ...], float]]]


def _of_census(census: Census, now_us: int) -> _Seen:
    oldest_s = max(now_us - census.oldest_us, 0) / 1e6 if census.oldest_us else 0.0
    return {
        families.JOBS: [((state.value,), float(count)) for state, count in census.jobs.items()],
        families.QUEUE_SLOTS: _one(census.queued_slots),
        families.QUEUE_AGE: _one(oldest_s),
        families.ATTEMPTS: _one(census.live_attempts),
        families.RESOURCES: [((kind.value,), float(count)) for kind, (count, _) in census.resources.items()],
        families.RESOURCE_BYTES: [((kind.value,), float(size)) for kind, (_, size) in census.resources.items()],
    }


def _of_cluster(view: ClusterView, slots: int, free: int) -> _Seen:
    return {
        families.CONNECTED: _one(view.connected),
        families.NODES: _one(len(view.nodes)),
        families.SLOTS: _one(slots),
        families.SLOTS_FREE: _one(free),
        families.GPUS: _one(sum(node.gpus for node in view.nodes)),
        families.GPUS_USED: _one(sum(node.used_gpus for node in view.nodes)),
    }


def _of_storage(storage: server_service_pb2.StorageInfo) -> _Seen:
    is_available = storage.state == server_service_pb2.StorageInfo.STATE_AVAILABLE
    return {families.STORAGE_AVAILABLE: _one(is_available), families.STORAGE_FREE: _one(storage.free_bytes)}


def _of_disk_and_gpus(database: Path | None, state_dir: Path) -> _Seen:
    found = os.statvfs(state_dir)
    return {
        families.STATE_FREE: _one(found.f_bavail * found.f_frsize),
        families.STORE_BYTES: _sizes(database) if database else [],
        **_of_gpus(gpu_use()),
    }


def _sizes(database: Path) -> list[tuple[tuple[str, ...], float]]:
    sizes: list[tuple[tuple[str, ...], float]] = []
    for name, path in (("database", database), ("log", database.with_name(f"{database.name}-wal"))):
        with suppress(FileNotFoundError):
            # Asked for without opening them: to close a file of SQLite's would drop its locks.
            sizes.append(((name,), float(path.stat().st_size)))
    return sizes


def _of_gpus(gpus: list[GpuUse]) -> _Seen:
    return {
        families.GPU_BUSY: [((each.gpu,), each.busy_share) for each in gpus if each.busy_share is not None],
        families.GPU_MEMORY: [((each.gpu,), float(each.used_bytes)) for each in gpus],
        families.GPU_MEMORY_TOTAL: [((each.gpu,), float(each.memory_bytes)) for each in gpus],
    }


def _writer(store: Store) -> _Seen:
    figures = store.writer_figures
    return {
        families.WRITER_WAITING: _one(figures.waiting),
        families.WRITER_WAITING_BYTES: _one(figures.waiting_bytes),
        families.WRITER_OPERATIONS: _one(figures.operations),
        families.WRITER_COMMITS: _one(figures.commits),
        families.WRITER_FAILED: _one(figures.failed_commits),
        families.WRITER_SECONDS: _one(figures.commit_s),
    }
