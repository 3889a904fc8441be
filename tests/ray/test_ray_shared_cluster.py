"""A Ray of several nodes that others use too: where supervisors live, what a lost node is called, who holds what."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from helpers.core import Core, new_job, running_core
from helpers.embedded_ray import ENVIRONMENT, connected
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, listeners, pids, runs, supervisor_of
from helpers.memory_groups import joined, limited_group
from helpers.service import Service, serving
from shardyard.v1 import job_pb2, server_service_pb2
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.confine import landlock_version
from shardyard_coordinator.launch.protocols import Launch, NodeGone, Presence, Unreachable
from shardyard_coordinator.launch.ray_launcher import RayCompute, RayLauncher

CPUS = 2
LIMIT = 1 << 30
LOOPBACK = {"node_ip_address": "127.0.0.1"}
FOREIGN = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
class Load:
    def ready(self):
        return True
loads = [Load.remote() for _ in range(int(sys.argv[2]))]
ray.get([load.ready.remote() for load in loads])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="syc-")
    Path(folder, "ray").mkdir()
    before = dict(os.environ)
    os.environ.update(
        RAY_TMPDIR=folder,
        RAY_AUTH_MODE="disabled",
        # Keeps every socket on loopback; that `ray start` refuses further nodes then does not concern these.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_USAGE_STATS_ENABLED="0",
        **ENVIRONMENT,
    )
    # Gangs live off the head, which is the only node that outlives the others here.
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **LOOPBACK})
    try:
        yield made
    finally:
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
async def launcher(cluster: Cluster, tmp_path: Path) -> AsyncIterator[RayLauncher]:
    made = RayLauncher(
        log=tmp_path / "agent.log", address=cluster.address, program="helpers.fake_trainer", environment=ENVIRONMENT
    )
    await made.start()
    await connected(made)
    yield made
    await made.close(stop_cluster=True)


async def test_a_supervisor_lives_and_dies_with_a_node_of_its_gang(
    cluster: Cluster, launcher: RayLauncher, tmp_path: Path
) -> None:
    stays, goes = await _node(cluster, launcher), await _node(cluster, launcher)
    there = [fake_launch(tmp_path, _LONG, workers=1, placement=((stays[0], 1),)) for _ in range(2)]
    gone = [fake_launch(tmp_path, _LONG, workers=1, placement=((goes[0], 1),)) for _ in range(2)]
    await asyncio.gather(*(launcher.ensure(launch) for launch in [*there, *gone]))
    await asyncio.gather(*(collect(launcher, launch.key, until="progress") for launch in [*there, *gone]))
    listening = listeners(psutil.Process())
    assert len(listening) >= 10
    assert [one for one in listening if one[1] not in ("127.0.0.1", "::1")] == []
    cluster.remove_node(goes[1], allow_graceful=False)
    async with asyncio.timeout(60):
        for launch in gone:
            while await launcher.lookup(launch.key) is not Presence.DEAD:
                await asyncio.sleep(0.1)
    assert [await launcher.lookup(launch.key) for launch in there] == [Presence.ALIVE] * 2
    late = fake_launch(tmp_path, _LONG, workers=1, placement=((goes[0], 1),))
    with pytest.raises(NodeGone, match=goes[0]):
        await launcher.ensure(late)
    for launch in there:
        await launcher.kill(launch.key)
    cluster.remove_node(stays[1])


async def test_a_lost_node_is_named_and_the_job_continues_elsewhere(
    cluster: Cluster, launcher: RayLauncher, tmp_path: Path
) -> None:
    first = await _node(cluster, launcher)
    async with running_core(tmp_path, launcher, poll_s=1.0) as core:
        job = await _job(core, workers=2)
        await core.when(job.uid, lambda job: job.last_step > 2, timeout_s=60)
        second = await _node(cluster, launcher)
        cluster.remove_node(first[1], allow_graceful=False)
        await core.when(job.uid, lambda job: job.epoch == 2 and job.last_step > 2, timeout_s=60)
        lost, _ = await core.attempts(job.uid)
        await core.cancel(job)
        await core.until(job.uid, JobState.CANCELLED)
    report = job_pb2.FailureReport.FromString(lost.failure)
    assert report.reason == "NODE_LOST" and first[0] in report.message
    cluster.remove_node(second[1])


async def test_a_job_waits_for_what_others_hold_and_says_so(
    cluster: Cluster, launcher: RayLauncher, tmp_path: Path
) -> None:
    node = await _node(cluster, launcher)
    with _foreign_load(cluster, 1):
        async with asyncio.timeout(20):
            while (await launcher.cluster()).nodes[0].used_cpus != 1:
                await asyncio.sleep(0.1)
        async with running_core(tmp_path, launcher) as core:
            job = await _job(core, workers=2)
            job = await core.when(job.uid, lambda job: bool(job.pending))
            pending = job_pb2.PendingInfo.FromString(job.pending)
            assert pending.message == "needs 2 slots, 1 free; 1 are held by others than this service"
            assert (job.state, job.epoch) == (JobState.QUEUED, 0)
            assert await core.loop.cluster_slots(await launcher.cluster()) == (2, 1)
    async with running_core(tmp_path, launcher) as core:
        job = await core.when(job.uid, lambda job: job.last_step > 2, timeout_s=60)
        await core.cancel(job)
        await core.until(job.uid, JobState.CANCELLED)
    assert job.epoch == 1
    cluster.remove_node(node[1])


async def test_a_rank_that_ends_for_want_of_memory_on_another_node_is_named_and_not_its_peers_error(
    cluster: Cluster, launcher: RayLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = await _node(cluster, launcher)
    with limited_group(LIMIT) as group:
        with joined(group):
            narrow = await _node(cluster, launcher)
        script = Script(steps=100_000, step_s=0.01, deaths={"1": [3, "balloon"]})
        by_kernel = await _failure(launcher, fake_launch(tmp_path, script, placement=((roomy[0], 1), (narrow[0], 1))))
        cluster.remove_node(narrow[1], allow_graceful=False)
    assert (by_kernel.reason, by_kernel.rank) == ("HOST_OOM", 1)
    assert (
        "rank 1 was killed by the system, which ran out of memory: 1.00 GiB were held, the limit is"
        in by_kernel.message
    )
    assert int(by_kernel.metadata["limit_bytes"]) == LIMIT
    # As an administrator may have set it: everything that runs there is too much.
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "200")
    strict = await _node(cluster, launcher)
    by_ray = await _failure(launcher, fake_launch(tmp_path, _LONG, placement=((roomy[0], 1), (strict[0], 1))))
    assert (by_ray.reason, by_ray.rank) == ("HOST_OOM", 1)
    assert "rank 1 was killed by the cluster's own memory monitor:" in by_ray.message
    assert int(by_ray.metadata["peak_bytes"]) > int(by_ray.metadata["limit_bytes"]) > 0
    cluster.remove_node(strict[1], allow_graceful=False)
    cluster.remove_node(roomy[1])


async def test_a_stopped_supervisor_is_named_and_a_kill_confirms_that_its_ranks_are_gone(
    cluster: Cluster, launcher: RayLauncher, tmp_path: Path
) -> None:
    node = await _node(cluster, launcher)
    launch = fake_launch(tmp_path, _LONG, placement=((node[0], 2),))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    supervisor = supervisor_of(launch)
    supervisor.suspend()
    with pytest.raises(Unreachable) as silent:
        await launcher.events_after(launch.key, 1_000_000, timeout_s=0.1, limit=1)
    assert str(silent.value) == (
        f"its supervisor, process {supervisor.pid} on node {node[0][:12]}, does not answer, though the cluster does"
    )
    await launcher.kill(launch.key)
    assert not any(runs(pid) for pid in (supervisor.pid, *pids(events)))
    cluster.remove_node(node[1])


@pytest.mark.skipif(landlock_version() < 4, reason="the kernel's Landlock has no rules for TCP")
async def test_the_restrictions_reported_are_those_of_the_current_processes(
    cluster: Cluster, launcher: RayLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each node has a Hub of its own, whose port its processes may connect to.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:7001")
    first = await _node(cluster, launcher)
    compute = RayCompute(
        launcher.link,
        log=tmp_path / "compute.log",
        folders=Folders(cache=str(tmp_path)),
        warm=["helpers.fake_compute"],
        environment=ENVIRONMENT,
    )
    await compute.start()
    async with serving(tmp_path, launcher=launcher, compute=compute) as service:
        assert "7001" in await _tcp_told(service)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:7002")
        second = await _node(cluster, launcher, cpus=CPUS + 1)
        psutil.Process(launcher.link.agent_pid).kill()
        assert "7002" in await _tcp_told(service, not_of="7001")
        cluster.remove_node(second[1], allow_graceful=False)
        assert "7001" in await _tcp_told(service, not_of="7002")
    cluster.remove_node(first[1])


_LONG = Script(steps=100_000, step_s=0.01)


async def _failure(launcher: RayLauncher, launch: Launch) -> job_pb2.FailureReport:
    """What a gang fails of; it is cleared away."""
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key)
    await launcher.kill(launch.key)
    [failure] = [event.failure for event in events if event.WhichOneof("payload") == "failure"]
    return failure


async def _tcp_told(service: Service, *, not_of: str = "-") -> str:
    """What GetServerInfo says of the processes' network, once it does, and no longer of that node's."""
    async with asyncio.timeout(60):
        while True:
            info = await service.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
            if "network" in info.confinement and not_of not in info.confinement["network"]:
                return str(info.confinement["network"])
            await asyncio.sleep(0.1)


async def _node(cluster: Cluster, launcher: RayLauncher, *, cpus: int = CPUS) -> tuple[str, object]:
    """Another node of the cluster, once it is known: its id, and what removes it."""
    before = {node.id for node in (await launcher.cluster()).nodes}
    added = cluster.add_node(num_cpus=cpus, **LOOPBACK)
    async with asyncio.timeout(30):
        while True:
            fresh = [node.id for node in (await launcher.cluster()).nodes if node.id not in before]
            if fresh:
                return fresh[0], added
            await asyncio.sleep(0.1)


async def _job(core: Core, *, workers: int) -> JobRecord:
    """A job whose every attempt is of the fake trainer, and long."""
    new = new_job(workers=workers)
    for epoch in (1, 2):
        _LONG.write(core.collector.settings.attempt_dir(new.uid, epoch))
    return await core.submit(new)


@contextmanager
def _foreign_load(cluster: Cluster, cpus: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", FOREIGN, cluster.address, str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.wait()
