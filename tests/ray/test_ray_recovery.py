"""What dies, and what continues: the agent, the coordinator, the supervisor, the control service, the whole head."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers.embedded_ray import ENVIRONMENT, Ray, connected, new_launcher
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, gone, kinds, pids, supervisor_of
from helpers.service import serving
from shardyard.v1 import server_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.protocols import AttemptKey, Presence, Unreachable
from shardyard_coordinator.launch.ray_head import EmbeddedHead
from shardyard_coordinator.launch.ray_launcher import RayLauncher
from shardyard_coordinator.launch.spool import read_spool


async def test_a_killed_agent_comes_back_and_no_event_is_lost(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key, until="progress")
    cluster_id = await connected(ray.launcher)
    poll = asyncio.create_task(ray.launcher.events_after(launch.key, 1_000_000, timeout_s=10, limit=1))
    await asyncio.sleep(0)
    psutil.Process(ray.launcher.link.agent_pid).kill()
    assert isinstance((await asyncio.gather(poll, return_exceptions=True))[0], Unreachable)
    assert await connected(ray.launcher) == cluster_id
    assert await ray.launcher.lookup(launch.key) == Presence.ALIVE
    directive = worker_pb2.Directive(action=worker_pb2.Directive.ACTION_STOP, reason="CANCELLED")
    await ray.launcher.direct(launch.key, directive.SerializeToString())
    events += await collect(ray.launcher, launch.key, after=len(events))
    assert kinds(events).count("ready") == 1
    assert kinds(events)[-2:] == ["stopped", "ended"]
    await ray.launcher.kill(launch.key)


async def test_a_stopped_agent_is_said_at_once_and_replaced_after_its_time(ray: Ray, tmp_path: Path) -> None:
    assert ray.head.record is not None
    launcher = RayLauncher(
        log=tmp_path / "ray-agent.log",
        address=ray.head.record.address,
        program="helpers.fake_trainer",
        environment=ray.head.environment(),
        agent_hung_s=15.0,
    )
    await launcher.start()
    await connected(launcher)
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    stopped = launcher.link.agent_pid
    async with serving(tmp_path, launcher=launcher) as service:
        ask = functools.partial(service.server.GetServerInfo, server_service_pb2.GetServerInfoRequest())
        assert (await ask()).cluster.state == server_service_pb2.ClusterInfo.STATE_CONNECTED
        psutil.Process(stopped).suspend()
        async with asyncio.timeout(5):
            while (told := (await ask()).cluster).state != server_service_pb2.ClusterInfo.STATE_UNREACHABLE:
                await asyncio.sleep(0.1)
        words = f"process {stopped}, does not answer; it is replaced after 15 s"
        assert words in told.message
        doctor = await asyncio.to_thread(_doctor, service.port)
        assert doctor.returncode == 1
        assert "broken  cluster: ray unreachable" in doctor.stdout and words in doctor.stdout
        await connected(launcher)
        assert (await ask()).cluster.state == server_service_pb2.ClusterInfo.STATE_CONNECTED
    assert launcher.link.agent_pid != stopped
    await gone(stopped)
    assert await launcher.lookup(launch.key) == Presence.ALIVE
    await collect(launcher, launch.key, after=len(events), until="progress")
    await launcher.kill(launch.key)
    await launcher.close(stop_cluster=False)


def _doctor(port: int) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "shardyard", "doctor", "--address", f"127.0.0.1:{port}"]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from helpers.embedded_ray import connected, new_launcher
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, pids

async def main():
    _, launcher = new_launcher(Path(sys.argv[1]))
    await launcher.start()
    cluster_id = await connected(launcher)
    launch = fake_launch(Path(sys.argv[2]), Script(steps=100_000, step_s=0.01))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    print(cluster_id, launcher.link.agent_pid, launch.key.job_uid, len(events), *pids(events), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_gang_outlives_its_coordinator_and_is_found_again(ray: Ray, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(ray.state), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert process.stdout is not None
    cluster_id, agent, job_uid, seen, *ranks = (await asyncio.to_thread(process.stdout.readline)).split()
    process.kill()
    process.wait()
    await gone(int(agent))
    _, launcher = new_launcher(ray.state)
    await launcher.start()
    try:
        assert await connected(launcher) == cluster_id
        key = AttemptKey(job_uid, 1)
        assert await launcher.lookup(key) == Presence.ALIVE
        assert all(psutil.pid_exists(int(rank)) for rank in ranks)
        assert kinds(await collect(launcher, key, after=int(seen), until="progress")) == ["progress"]
        await launcher.kill(key)
    finally:
        await launcher.close(stop_cluster=False)
    assert ray.head.alive()


async def test_ranks_die_with_their_supervisor_and_the_spool_is_read_by_path(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key, until="progress")
    supervisor_of(launch).kill()
    for pid in pids(events):
        await gone(pid)
    async with asyncio.timeout(10):
        while await ray.launcher.lookup(launch.key) != Presence.DEAD:
            await asyncio.sleep(0.05)
    spooled = [
        worker_pb2.WorkerEvent.FromString(raw) for raw in read_spool(Path(launch.attempt_dir) / "spool.bin", after=0)
    ]
    assert spooled[: len(events)] == events


async def test_a_dead_control_service_means_a_new_cluster_and_lost_attempts(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key, until="progress")
    cluster_id = await connected(ray.launcher)
    assert ray.head.record is not None
    old_head = ray.head.record.pid
    [gcs] = [one for one in psutil.Process(old_head).children(recursive=True) if one.name() == "gcs_server"]
    gcs.kill()
    async with asyncio.timeout(60):
        while (view := await ray.launcher.cluster()).cluster_id == cluster_id or not view.connected:
            await asyncio.sleep(0.05)
    assert await ray.launcher.lookup(launch.key) == Presence.DEAD
    for pid in pids(events):
        await gone(pid)
    assert _session(old_head) == []
    again = fake_launch(tmp_path, Script(steps=1))
    await ray.launcher.ensure(again)
    assert (await collect(ray.launcher, again.key))[-1].ended.ok
    await ray.launcher.kill(again.key)


async def test_a_head_that_was_killed_is_cleared_away_and_a_stopped_one_leaves_nothing(tmp_path: Path) -> None:
    head = EmbeddedHead(tmp_path / "state", cpus=1)
    await head.ensure()
    assert head.record is not None
    first = head.record
    psutil.Process(first.pid).kill()
    await gone(first.pid)
    found = EmbeddedHead(tmp_path / "state", cpus=1)
    await found.ensure()
    assert found.record is not None
    assert _session(first.pid) == []
    assert not Path(first.temp_dir).exists()
    second = found.record
    # As during a start: the process is not known yet.
    (tmp_path / "state" / "ray.json").write_text(
        json.dumps({"pid": 0, "start_time": 0.0, "address": "", "temp_dir": second.temp_dir})
    )
    await EmbeddedHead(tmp_path / "state", cpus=1).stop()
    assert _session(second.pid) == []
    assert not Path(second.temp_dir).parent.exists()


async def test_a_ray_that_runs_but_can_start_no_worker_any_more_is_replaced(tmp_path: Path) -> None:
    head = EmbeddedHead(tmp_path / "state", cpus=1, environment=ENVIRONMENT)
    launcher = RayLauncher(log=tmp_path / "agent.log", head=head, program="helpers.fake_trainer")
    await launcher.start()
    try:
        cluster_id = await connected(launcher)
        assert head.record is not None and head.intact()
        first = head.record
        # As a cleaner of temporary files would.
        shutil.rmtree(Path(first.temp_dir).parent)
        with pytest.raises(Unreachable):
            await launcher.link.ask({"method": "nodes"}, timeout_s=0)
        async with asyncio.timeout(90):
            while (view := await launcher.cluster()).cluster_id == cluster_id or not view.connected:
                await asyncio.sleep(0.05)
        assert _session(first.pid) == []
    finally:
        await launcher.close(stop_cluster=False)
    # Its token is in a place that is no longer read.
    (tmp_path / "state").rename(tmp_path / "moved")
    moved = EmbeddedHead(tmp_path / "moved", cpus=1)
    second = moved.record
    assert second is not None and moved.alive() and not moved.intact()
    await moved.ensure()
    assert moved.intact() and _session(second.pid) == []
    await moved.stop()


def _session(leader: int) -> list[str]:
    """What still runs of a head's session."""
    left = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.name())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return left
