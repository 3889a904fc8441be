"""Joining a Ray that another program started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.confined import looking_launch
from helpers.embedded_ray import Ray, connected
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch
from shardyard_coordinator.launch.confine import landlock_version
from shardyard_coordinator.launch.ray_launcher import RayLauncher


async def test_a_cluster_is_joined_by_its_address_and_left_alone(ray: Ray, tmp_path: Path) -> None:
    assert ray.head.record is not None
    other = RayLauncher(
        log=tmp_path / "ray-agent.log",
        address=ray.head.record.address,
        program="helpers.fake_trainer",
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


async def test_an_address_where_nothing_listens_is_reported_and_tried_again(tmp_path: Path) -> None:
    launcher = RayLauncher(log=tmp_path / "ray-agent.log", address="127.0.0.1:1")
    await launcher.start()
    view = await launcher.cluster()
    assert (view.connected, view.nodes, view.message) == (False, (), "not connected yet")
    await launcher.close(stop_cluster=True)


def test_a_launcher_has_either_a_ray_of_its_own_or_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either"):
        RayLauncher(log=tmp_path / "ray-agent.log")


@pytest.mark.skipif(landlock_version() < 2, reason="the kernel's Landlock has no rules for ranks")
async def test_a_rank_opens_what_its_job_needs_and_nothing_else(ray: Ray, tmp_path: Path) -> None:
    assert ray.head.record is not None
    root, storage = tmp_path / "root", tmp_path / "state" / "storage"
    root.mkdir()
    storage.mkdir(parents=True)
    (root / "rows.csv").write_text("text")
    (tmp_path / "state" / "store.db").write_text("tokens")
    session = ray.head.environment()["RAY_TMPDIR"]
    rows = [
        ("read", root / "rows.csv", "done"),
        ("write", root / "rows.csv", "PermissionError"),
        ("read", tmp_path / "state" / "store.db", "PermissionError"),
        ("read", Path("/etc/passwd"), "PermissionError"),
        ("list", Path.home(), "PermissionError"),
        ("list", Path(session), "PermissionError"),
        ("read", Path(f"/proc/{ray.head.record.pid}/environ"), "PermissionError"),
        ("write", storage / "jobs" / "one" / "notes", "done"),
        ("write", storage / "store-id", "PermissionError"),
        ("put", storage / "models" / "mine", "done"),
        ("meet", Path(), "done"),
    ]
    launcher = RayLauncher(
        log=tmp_path / "ray-agent.log",
        address=ray.head.record.address,
        program="helpers.looking_rank",
        environment=ray.head.environment(),
        hidden=str(tmp_path / "state"),
    )
    await launcher.start()
    await connected(launcher)
    launch = looking_launch(storage, root, [(verb, path) for verb, path, _ in rows])
    await launcher.ensure(launch)
    try:
        assert (await collect(launcher, launch.key))[-1].ended.ok
        seen = json.loads((Path(launch.attempt_dir) / "seen.json").read_text())
        assert [(verb, path, found) for (verb, path, _), found in zip(rows, seen, strict=True)] == rows
    finally:
        await launcher.kill(launch.key)
        await launcher.close(stop_cluster=True)
