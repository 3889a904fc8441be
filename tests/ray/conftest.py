"""One embedded Ray for all tests here: it takes seconds to start."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from helpers.embedded_ray import Ray, connected, new_launcher
from helpers.launches import TESTS
from shardyard_coordinator.launch.process_compute import Size
from shardyard_coordinator.launch.ray_launcher import RayCompute


@pytest.fixture(scope="session")
async def ray(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ray]:
    state = tmp_path_factory.mktemp("state")
    head, launcher = new_launcher(state)
    compute = RayCompute(
        launcher.link,
        log=state / "compute.log",
        size=Size(memory_bytes=200 * 1024**2),
        warm=["helpers.fake_compute"],
        answerer="helpers.fake_compute:answerer",
        environment={"PYTHONPATH": str(TESTS)},
    )
    await launcher.start()
    await compute.start()
    await connected(launcher)
    yield Ray(state, head, launcher, compute)
    await launcher.close(stop_cluster=True)
