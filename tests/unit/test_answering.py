"""Which processes answer for models: who waits for a place, who is replaced, and what a close leaves."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from shardyard_coordinator.launch.answering import Answering
from shardyard_coordinator.launch.forks import Ending, Fork
from shardyard_coordinator.launch.frames import Header
from shardyard_coordinator.launch.protocols import ComputeUnavailable, InputFailed

MOST = 8


class FakeFork:
    """Is at every question forever, until it dies; `computes`: it does, and does not wait for a disk."""

    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.pid = next(self.numbers)
        self._out: asyncio.Queue[tuple[Header, bytes] | None] = asyncio.Queue()
        self.computes = self.killed = False

    async def send(self, header: Header, body: bytes = b"") -> None:
        if "id" in header:
            self._out.put_nowait(({"computing": [header["id"]]}, b""))

    async def receive(self) -> tuple[Header, bytes] | None:
        return await self._out.get()

    async def end(self) -> Ending:
        return Ending(-9)

    def kill(self) -> None:
        self.killed = True
        self._out.put_nowait(None)

    def own_bytes(self) -> int:
        return 0

    def cpu_s(self) -> float:
        return time.monotonic() if self.computes else 0.0


class Forks:
    def __init__(self) -> None:
        self.made: list[FakeFork] = []

    async def __call__(self) -> Fork:
        self.made.append(FakeFork())
        return cast(Fork, self.made[-1])


def answering(forks: Forks) -> Answering:
    return Answering(cast(Callable[[], Awaitable[Fork]], forks), memory_bytes=1 << 30)


def ask(models: Answering, model: str, *, turn_s: float = 3600) -> asyncio.Task[bytes]:
    return asyncio.create_task(models.ask("f", model, b"", caller=("local", model), turn_s=turn_s))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_a_model_that_waits_for_a_place_does_not_hold_up_one_whose_process_died() -> None:
    forks = Forks()
    models = answering(forks)
    asked = [ask(models, f"m{number}") for number in range(MOST)]
    await until(lambda: len(forks.made) == MOST)
    ninth = ask(models, "ninth")
    await asyncio.sleep(0.05)
    forks.made[0].kill()
    await until(lambda: len(forks.made) == MOST + 1)
    assert not ninth.done() and not asked[0].done()
    await models.close()
    answers = await asyncio.gather(*asked, ninth, return_exceptions=True)
    assert {type(each) for each in answers} == {ComputeUnavailable}


async def test_a_close_fails_the_questions_under_way_and_begins_no_process() -> None:
    forks = Forks()
    models = answering(forks)
    asked = ask(models, "m")
    await until(lambda: len(forks.made) == 1)
    await models.close()
    async with asyncio.timeout(1):
        with pytest.raises(ComputeUnavailable, match="stopping"):
            await asked
    assert len(forks.made) == 1


@pytest.mark.parametrize(("computes", "error"), [(True, InputFailed), (False, ComputeUnavailable)])
async def test_a_turn_that_computes_too_long_is_the_inputs_fault_and_one_that_waits_is_not(
    computes: bool, error: type[Exception]
) -> None:
    forks = Forks()
    models = answering(forks)
    asked = ask(models, "m", turn_s=0.1)
    await until(lambda: len(forks.made) == 1)
    forks.made[0].computes = computes
    async with asyncio.timeout(10):
        with pytest.raises(error, match="takes more than"):
            await asked
    assert len(forks.made) == 1
    await models.close()


async def test_a_turn_whose_caller_has_left_has_its_limit_and_ends_with_its_verdict() -> None:
    forks = Forks()
    models = answering(forks)
    asked = ask(models, "m", turn_s=0.1)
    await until(lambda: len(forks.made) == 1)
    forks.made[0].computes = True
    await asyncio.sleep(0.02)
    asked.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(InputFailed, match="takes more than"):
            await asked
    assert forks.made[0].killed
    await models.close()
