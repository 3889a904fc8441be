"""Warm subprocesses: answers, failures, deadlines, memory, deaths."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helpers.launches import TESTS, gone
from shardyard_coordinator.launch.process_compute import ProcessCompute
from shardyard_coordinator.launch.protocols import ComputeFailed, ComputeUnavailable


@pytest.fixture
async def compute(tmp_path: Path) -> AsyncIterator[ProcessCompute]:
    processes = ProcessCompute(
        log=tmp_path / "compute.log",
        memory_bytes=200 * 1024**2,
        warm=["helpers.fake_compute"],
        environment={"PYTHONPATH": str(TESTS)},
    )
    await processes.start()
    yield processes
    await processes.close()


async def test_a_warm_process_answers_again_and_again(compute: ProcessCompute) -> None:
    payload = bytes(range(256)) * 10_000
    assert await compute.call("helpers.fake_compute:echo", payload, deadline_s=20) == payload
    first = await compute.call("helpers.fake_compute:pid", b"", deadline_s=20)
    assert await compute.call("helpers.fake_compute:pid", b"", deadline_s=20) == first


async def test_what_a_function_raises_is_for_the_log(compute: ProcessCompute) -> None:
    with pytest.raises(ComputeFailed, match="ValueError: no such column"):
        await compute.call("helpers.fake_compute:fail", b"no such column", deadline_s=20)
    assert await compute.call("helpers.fake_compute:echo", b"on", deadline_s=20) == b"on"


async def test_a_process_past_its_deadline_is_replaced(compute: ProcessCompute) -> None:
    first = await compute.call("helpers.fake_compute:pid", b"", deadline_s=20)
    with pytest.raises(TimeoutError):
        await compute.call("helpers.fake_compute:sleep", b"30", deadline_s=0.2)
    assert await compute.call("helpers.fake_compute:pid", b"", deadline_s=20) != first


async def test_a_busy_pool_is_unavailable_within_the_deadline(compute: ProcessCompute) -> None:
    await compute.call("helpers.fake_compute:echo", b"", deadline_s=20)
    with pytest.raises(TimeoutError):
        await compute.call("helpers.fake_compute:sleep", b"30", deadline_s=0.05)
    with pytest.raises(ComputeUnavailable):
        await compute.call("helpers.fake_compute:echo", b"", deadline_s=0.01)


async def test_a_process_that_dies_or_grows_fails_its_call_alone(compute: ProcessCompute) -> None:
    with pytest.raises(ComputeFailed, match="died"):
        await compute.call("helpers.fake_compute:die", b"", deadline_s=20)
    with pytest.raises(ComputeFailed, match="memory"):
        await compute.call("helpers.fake_compute:grow", b"300", deadline_s=20)
    assert await compute.call("helpers.fake_compute:echo", b"on", deadline_s=20) == b"on"


async def test_closing_ends_the_processes(tmp_path: Path) -> None:
    processes = ProcessCompute(
        log=tmp_path / "compute.log", warm=["helpers.fake_compute"], environment={"PYTHONPATH": str(TESTS)}
    )
    await processes.start()
    pid = int(await processes.call("helpers.fake_compute:pid", b"", deadline_s=20))
    await processes.close()
    await gone(pid)
    assert not Path(f"/proc/{pid}").exists()
