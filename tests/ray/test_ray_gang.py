"""Gangs on a real, private Ray: order, deaths, directives, and what listens meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from helpers.embedded_ray import Ray
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, gone, kinds, listeners, pids, runs
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.protocols import Presence
from shardyard_coordinator.launch.spool import read_spool


async def test_a_gang_of_two_reports_in_order_and_ends_well(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=3))
    assert await ray.launcher.lookup(launch.key) == Presence.ABSENT
    await ray.launcher.ensure(launch)
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key)
    assert kinds(events) == ["ready", "resumed", *["progress"] * 3, "finished", "ended"]
    assert events[-1].ended.ok
    assert await ray.launcher.lookup(launch.key) == Presence.ALIVE
    await ray.launcher.kill(launch.key)
    assert await ray.launcher.lookup(launch.key) == Presence.DEAD
    with pytest.raises(LookupError):
        await ray.launcher.events_after(launch.key, 0, timeout_s=1.0, limit=1)
    assert len(read_spool(Path(launch.attempt_dir) / "spool.bin", after=0)) == 7
    await ray.launcher.kill(launch.key)


DEATHS = [("kill", "WORKER_LOST"), ("exit", "UNKNOWN"), ("report", "DATA_ERROR")]


@pytest.mark.parametrize(("how", "reason"), DEATHS, ids=[row[0] for row in DEATHS])
async def test_the_rank_that_fails_first_is_named(ray: Ray, tmp_path: Path, how: str, reason: str) -> None:
    launch = fake_launch(tmp_path, Script(steps=1000, step_s=0.01, deaths={"1": [3, how]}))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key)
    failures = [event.failure for event in events if event.WhichOneof("payload") == "failure"]
    assert [(failure.reason, failure.rank, failure.step, failure.attempt) for failure in failures] == [
        (reason, 1, 2, 1)
    ]
    assert "rank 1 dies at step 3" in failures[0].log_tail
    assert kinds(events)[-1] == "ended"
    assert not events[-1].ended.ok
    await ray.launcher.kill(launch.key)


async def test_a_rank_killed_from_outside_is_known_at_once(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key, until="progress")
    killed_at = time.monotonic()
    psutil.Process(pids(events)[1]).kill()
    events += await collect(ray.launcher, launch.key, after=len(events), until="failure")
    # Half a second of it is the wait for better explanations.
    assert time.monotonic() - killed_at < 2.0
    assert (events[-1].failure.reason, events[-1].failure.rank) == ("WORKER_LOST", 1)
    await ray.launcher.kill(launch.key)
    await gone(pids(events)[0])


async def test_a_directive_stops_the_gang_at_a_step(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.005))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key, until="progress")
    directive = worker_pb2.Directive(action=worker_pb2.Directive.ACTION_STOP, reason="CANCELLED")
    await ray.launcher.direct(launch.key, directive.SerializeToString())
    events += await collect(ray.launcher, launch.key, after=len(events))
    assert kinds(events)[-2:] == ["stopped", "ended"]
    assert events[-1].ended.ok
    await ray.launcher.kill(launch.key)


async def test_a_killed_gang_is_gone_with_all_that_it_started_and_its_place_is_free(ray: Ray, tmp_path: Path) -> None:
    for _ in range(2):
        # All four of the cluster's cores: the second gang starts only if the first one's are free.
        launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01, leftover=True), workers=4)
        await ray.launcher.ensure(launch)
        events = await collect(ray.launcher, launch.key, until="progress")
        meeting = Path(launch.attempt_dir) / "meeting"
        await ray.launcher.kill(launch.key)
        assert not any(runs(pid) for pid in pids(events))
        for rank in range(4):
            await gone(int((meeting / f"child-{rank}").read_text()))
        assert await ray.launcher.lookup(launch.key) == Presence.DEAD


async def test_a_gang_is_placed_on_the_node_that_was_chosen(ray: Ray, tmp_path: Path) -> None:
    [node] = (await ray.launcher.cluster()).nodes
    assert (node.address, node.cpus, node.gpus) == ("127.0.0.1", 4, 0)
    launch = fake_launch(tmp_path, Script(steps=1), placement=((node.id, 2),))
    await ray.launcher.ensure(launch)
    assert (await collect(ray.launcher, launch.key))[-1].ended.ok
    await ray.launcher.kill(launch.key)


async def test_while_a_gang_runs_nothing_listens_beyond_loopback(ray: Ray, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=100_000, step_s=0.01))
    await ray.launcher.ensure(launch)
    events = await collect(ray.launcher, launch.key, until="progress")
    assert ray.head.record is not None
    roots = psutil.Process(), psutil.Process(ray.head.record.pid)
    tree = {process.pid for root in roots for process in [root, *root.children(recursive=True)]}
    assert {ray.launcher.link.agent_pid, *pids(events)} <= tree
    listening = listeners(*roots)
    assert len(listening) >= 5
    assert [one for one in listening if one[1] not in ("127.0.0.1", "::1")] == []
    await ray.launcher.kill(launch.key)
