"""What Prometheus asks for is looked up once for all, and whatever hangs is not waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from helpers.clock import ManualClock
from helpers.stores import SQLITE, store_at
from shardyard.v1 import server_service_pb2
from shardyard_coordinator.control.starts import Starts
from shardyard_coordinator.launch.protocols import ClusterView, Node
from shardyard_coordinator.monitoring import families
from shardyard_coordinator.monitoring.sampler import Sampler, Sources
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store.store import open_store

ON_BOTH_STORES = True
VIEW = ClusterView(True, "id", "ray", (Node("n", "10.0.0.1", 8, 2, 1 << 30, used_gpus=1),))


class Cluster:
    """A cluster that answers when `answers` is set; `asked` counts the questions."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.asked = 0

    async def view(self) -> ClusterView:
        self.asked += 1
        await self.answers.wait()
        return VIEW


async def slots(_view: ClusterView) -> tuple[int, int]:
    return 8, 5


async def storage() -> server_service_pb2.StorageInfo:
    return server_service_pb2.StorageInfo(state=server_service_pb2.StorageInfo.STATE_FULL, free_bytes=7)


@contextlib.asynccontextmanager
async def sampling(folder: Path) -> AsyncIterator[tuple[Sampler, Cluster]]:
    clock, cluster = ManualClock(), Cluster()
    store = await open_store(store_at(folder), clock, NullTrace())
    sampler = Sampler("1.2", lambda: False, keep_s=0, wait_s=0.05, rest=0)
    sources = Sources(
        store=store,
        starts=Starts(),
        state_dir=folder,
        cluster=cluster.view,
        slots=slots,
        storage=storage,
        now_us=clock.now_us,
    )
    sampler.open(sources)
    try:
        yield sampler, cluster
    finally:
        await sampler.close()
        await store.close()


async def test_a_cluster_that_hangs_is_not_waited_for_and_not_asked_again(tmp_path: Path) -> None:
    async with sampling(tmp_path) as (sampler, cluster):
        await asyncio.gather(*(sampler.refresh() for _ in range(5)))
        await sampler.refresh()
        found = sampler.samples()
        assert cluster.asked == 1 and families.JOBS not in found and families.CENSUS_AGE not in found
        assert found[families.INFO] == [(("1.2",), 1.0)] and found[families.SERVING] == [((), 0.0)]
        assert families.WRITER_COMMITS in found
        cluster.answers.set()
        while families.JOBS not in sampler.samples():
            await sampler.refresh()
        found = sampler.samples()
        assert dict(found[families.JOBS])["QUEUED",] == 0 and found[families.GPUS_USED] == [((), 1.0)]
        assert found[families.SLOTS_FREE] == [((), 5.0)] and found[families.STORAGE_AVAILABLE] == [((), 0.0)]
        assert found[families.CENSUS_AGE][0][1] < 60


async def test_the_size_of_a_file_that_is_not_the_store_is_not_reported(tmp_path: Path, store_kind: str) -> None:
    (tmp_path / "store.db").touch()  # After a move to PostgreSQL it stays.
    async with sampling(tmp_path) as (sampler, cluster):
        cluster.answers.set()
        while families.JOBS not in sampler.samples():
            await sampler.refresh()
        files = dict(sampler.samples()[families.STORE_BYTES])
    assert set(files) == ({("database",), ("log",)} if store_kind == SQLITE else set())


async def test_the_last_numbers_are_kept_when_a_later_look_hangs_or_the_parts_are_closed(tmp_path: Path) -> None:
    async with sampling(tmp_path) as (sampler, cluster):
        cluster.answers.set()
        while families.JOBS not in sampler.samples():
            await sampler.refresh()
        cluster.answers.clear()
        await sampler.refresh()
        assert families.JOBS in sampler.samples() and families.CENSUS_AGE in sampler.samples()
        await sampler.close()
        await sampler.refresh()
        assert families.JOBS in sampler.samples() and families.WRITER_COMMITS not in sampler.samples()
