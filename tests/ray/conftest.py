"""One embedded Ray for all tests here: it takes seconds to start."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from helpers.embedded_ray import Ray, connected, new_launcher
from shardyard_coordinator.launch.ray_launcher import RayCompute


@pytest.fixture(scope="session")
async def ray(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ray]:
    state = tmp_path_factory.mktemp("state")
    head, launcher = new_launcher(state)
    compute = RayCompute(launcher.link, warm=["helpers.fake_compute"], memory_bytes=200 * 1024**2)
    await launcher.start()
    await compute.start()
    await connected(launcher)
    yield Ray(state, head, launcher, compute)
    await launcher.close(stop_cluster=True)
