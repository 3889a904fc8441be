"""Compute processes on a node of the cluster: the same as beside a coordinator, whatever becomes of their actor."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from helpers.embedded_ray import Ray
from helpers.launches import gone
from shardyard_coordinator.launch.protocols import ComputeFailed, ComputeUnavailable, InputFailed

ME = ("local", "mine")


async def look(ray: Ray, name: str, request: bytes = b"", **options: object) -> bytes:
    settings = {"caller": ME, "cpu_s": 30.0, **options}
    return await ray.compute.inspect(f"helpers.fake_compute:{name}", request, **settings)  # type: ignore[arg-type]


async def test_inspections_and_models_have_processes_of_their_own_on_the_cluster(ray: Ray) -> None:
    payload = bytes(range(256)) * 10_000
    assert await look(ray, "echo", payload) == payload
    with pytest.raises(InputFailed, match="unexpected error"):
        await look(ray, "fail", b"no such column")
    with pytest.raises(InputFailed, match="SIGKILL") as raised:
        await look(ray, "die", b"train.csv")
    assert raised.value.what == "train.csv"
    with pytest.raises(InputFailed, match="takes more than"):
        await look(ray, "spin", cpu_s=1.0)
    with pytest.raises(ComputeFailed, match="No space left"):
        await look(ray, "fail_of_the_system")
    assert len({await look(ray, "pid", route=b"files") for _ in range(2)}) == 1
    asked = (ray.compute.ask("fake:ask", "model", b"size", caller=(str(i),), turn_s=30) for i in range(16))
    assert max(map(int, await asyncio.gather(*asked))) > 1


async def test_an_actor_that_dies_is_replaced(ray: Ray) -> None:
    fork = psutil.Process(int(await look(ray, "pid", route=b"kept")))
    warm = fork.parent()
    assert warm is not None
    actor = warm.parent()
    assert actor is not None
    actor.kill()
    for process in (actor, warm, fork):
        await gone(process.pid)
    for _ in range(20):
        try:
            assert await look(ray, "echo", b"on") == b"on"
            return
        except ComputeUnavailable:
            await asyncio.sleep(0.5)
    raise AssertionError("no actor came")
