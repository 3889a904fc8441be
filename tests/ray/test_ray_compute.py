"""Warm actors: answers, failures, deadlines, memory, deaths."""

from __future__ import annotations

import pytest

from helpers.embedded_ray import Ray
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
