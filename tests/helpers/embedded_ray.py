"""Launchers on one embedded Ray, made as a coordinator makes them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from helpers.launches import TESTS
from shardyard_coordinator.launch.ray_head import EmbeddedHead
from shardyard_coordinator.launch.ray_launcher import RayCompute, RayLauncher

ENVIRONMENT = {"PYTHONPATH": str(TESTS)}


@dataclass(frozen=True)
class Ray:
    """A connected launcher, and the head that it runs on."""

    state: Path
    head: EmbeddedHead
    launcher: RayLauncher
    compute: RayCompute


def new_launcher(state: Path) -> tuple[EmbeddedHead, RayLauncher]:
    """As a coordinator makes them; a second one of the same state finds the first one's Ray."""
    head = EmbeddedHead(state, cpus=4, environment=ENVIRONMENT)
    return head, RayLauncher(log=state / "ray-agent.log", head=head, program="helpers.fake_trainer")


async def connected(launcher: RayLauncher, timeout_s: float = 60.0) -> str:
    """Waits for the cluster; its id."""
    async with asyncio.timeout(timeout_s):
        while not (view := await launcher.cluster()).connected:
            await asyncio.sleep(0.05)
    return view.cluster_id
