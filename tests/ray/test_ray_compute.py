"""Warm actors: answers, failures, deadlines, memory, deaths."""

from __future__ import annotations

import psutil
import pytest

from helpers.embedded_ray import Ray
from helpers.launches import gone
from shardyard_coordinator.launch.protocols import ComputeFailed


async def test_a_warm_actor_answers_fails_and_is_replaced_when_late_dead_or_large(ray: Ray) -> None:
    payload = bytes(range(256)) * 10_000
    assert await ray.compute.call("helpers.fake_compute:echo", payload, deadline_s=30) == payload
    with pytest.raises(ComputeFailed, match="ValueError: no such column"):
        await ray.compute.call("helpers.fake_compute:fail", b"no such column", deadline_s=30)
    first = await ray.compute.call("helpers.fake_compute:pid", b"", deadline_s=30)
    assert await ray.compute.call("helpers.fake_compute:pid", b"", deadline_s=30) == first
    with pytest.raises(TimeoutError):
        await ray.compute.call("helpers.fake_compute:sleep", b"30", deadline_s=0.2)
    second = await ray.compute.call("helpers.fake_compute:pid", b"", deadline_s=30)
    assert second != first
    with pytest.raises(ComputeFailed):
        await ray.compute.call("helpers.fake_compute:die", b"", deadline_s=30)
    assert await ray.compute.call("helpers.fake_compute:pid", b"", deadline_s=30) != second
    # One that dies while nobody asks it anything fails no call.
    idle = await ray.compute.call("helpers.fake_compute:pid", b"", deadline_s=30)
    psutil.Process(int(idle)).kill()
    await gone(int(idle))
    assert await ray.compute.call("helpers.fake_compute:echo", b"on", deadline_s=30) == b"on"
