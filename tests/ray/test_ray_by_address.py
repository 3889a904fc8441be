"""Joining a Ray that somebody else started."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.embedded_ray import Ray, connected
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch
from shardyard_coordinator.launch.ray_launcher import RayLauncher


async def test_a_cluster_is_joined_by_its_address_and_left_alone(ray: Ray, tmp_path: Path) -> None:
    assert ray.head.record is not None
    other = RayLauncher(
        log=tmp_path / "ray-agent.log",
        address=ray.head.record.address,
        entry="helpers.fake_trainer:run",
        environment=ray.head.environment(),
    )
    await other.start()
    assert await connected(other) == await connected(ray.launcher)
    launch = fake_launch(tmp_path, Script(steps=2))
    await other.ensure(launch)
    assert (await collect(other, launch.key))[-1].ended.ok
    await other.kill(launch.key)
    await other.close(stop_cluster=True)
    assert ray.head.alive()
    await connected(ray.launcher)


async def test_an_address_where_nothing_listens_is_said_and_asked_again(tmp_path: Path) -> None:
    launcher = RayLauncher(log=tmp_path / "ray-agent.log", address="127.0.0.1:1")
    await launcher.start()
    view = await launcher.cluster()
    assert (view.connected, view.nodes, view.message) == (False, (), "not connected yet")
    await launcher.close(stop_cluster=True)


def test_a_launcher_has_either_a_ray_of_its_own_or_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either"):
        RayLauncher(log=tmp_path / "ray-agent.log")
