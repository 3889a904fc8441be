"""Which processes answer for models: who waits for a place, who is replaced, and what a close leaves."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import cast

import pytest

from shardyard_coordinator.launch.answering import Answering
from shardyard_coordinator.launch.forks import Ending, Fork
from shardyard_coordinator.launch.frames import Header
from shardyard_coordinator.launch.protocols import ComputeUnavailable

MOST = 8


class FakeFork:
    """Computes every question for ever, until it dies or is told to answer."""

    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.pid = next(self.numbers)
        self._out: asyncio.Queue[tuple[Header, bytes] | None] = asyncio.Queue()

    async def send(self, header: Header, body: bytes = b"") -> None:
        if "id" in header:
            self._out.put_nowait(({"computing": [header["id"]]}, b""))
            if body == b"answer":
                self._out.put_nowait(({"id": header["id"], "ok": True}, str(self.pid).encode()))

    async def receive(self) -> tuple[Header, bytes] | None:
        return await self._out.get()

    async def end(self) -> Ending:
        return Ending(-9)

    def kill(self) -> None:
        self._out.put_nowait(None)

    def own_bytes(self) -> int:
        return 0


class Forks:
    def __init__(self) -> None:
        self.made: list[FakeFork] = []

    async def __call__(self) -> Fork:
        self.made.append(FakeFork())
        return cast(Fork, self.made[-1])


def answering(forks: Forks) -> Answering:
    return Answering(cast(Callable[[], Awaitable[Fork]], forks), memory_bytes=1 << 30)


def ask(models: Answering, model: str, request: bytes = b"") -> asyncio.Task[bytes]:
    return asyncio.create_task(models.ask("f", model, request, caller=("local", model), turn_s=3600))


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
