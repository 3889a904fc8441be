"""The agent's compute actor: started once for all calls, and replaced when it is gone."""

from __future__ import annotations

import asyncio

import pytest

from shardyard_coordinator.launch.agent_server import Unavailable
from shardyard_coordinator.launch.compute_place import ComputePlace


class Gone(Exception):
    """Stands for Ray's error of calls to an actor that no longer exists."""


class Method:
    """A method of an actor, called through `remote` as in Ray."""

    def __init__(self, actor: Actor, answer: object) -> None:
        self._actor = actor
        self._answer = answer

    async def remote(self, *arguments: object) -> object:
        await asyncio.sleep(0)
        if self._actor.is_gone:
            raise Gone("the actor died\nits trace")
        if self._actor.is_away:
            raise TimeoutError
        return self._answer


class Actor:
    """Answers every call with its number."""

    def __init__(self, number: int) -> None:
        self.is_gone = self.is_away = False
        self.call = Method(self, b"%d" % number)
        self.confinement = Method(self, {"number": number})


class Starts:
    """Starts actors; the first `failing` starts fail."""

    def __init__(self, failing: int = 0) -> None:
        self.actors: list[Actor] = []
        self.tries = 0
        self._failing = failing

    async def __call__(self) -> Actor:
        self.tries += 1
        await asyncio.sleep(0)
        if self.tries <= self._failing:
            raise Unavailable("the compute actor did not start")
        self.actors.append(Actor(len(self.actors) + 1))
        return self.actors[-1]


async def test_calls_that_come_together_share_one_actor() -> None:
    starts = Starts()
    place = ComputePlace(starts, gone=Gone)
    assert await asyncio.gather(*(place.call(b"") for _ in range(3))) == [b"1"] * 3
    assert starts.tries == 1


async def test_an_actor_that_is_gone_is_replaced_once_and_its_calls_say_so() -> None:
    starts = Starts()
    place = ComputePlace(starts, gone=Gone)
    await place.call(b"")
    starts.actors[0].is_gone = True
    errors = await asyncio.gather(place.call(b""), place.call(b""), return_exceptions=True)
    assert [(type(error), str(error)) for error in errors] == [
        (Unavailable, "the compute actor is gone: the actor died")
    ] * 2
    assert await place.call(b"") == b"2" and starts.tries == 2


async def test_an_actor_that_is_gone_is_replaced_though_nothing_is_asked_of_it() -> None:
    starts = Starts()
    place = ComputePlace(starts, gone=Gone, look_s=0.01)
    await place.call(b"")
    starts.actors[0].is_away = True
    await asyncio.sleep(0.05)  # A look fails, and the next one comes.
    starts.actors[0].is_gone = True
    async with asyncio.timeout(10):
        while starts.tries < 2:
            await asyncio.sleep(0.01)
    assert await place.call(b"") == b"2"


async def test_a_call_after_a_failed_start_tries_again() -> None:
    starts = Starts(failing=2)
    place = ComputePlace(starts, gone=Gone)
    with pytest.raises(Unavailable, match="did not start"):
        await place.call(b"")
    assert await place.call(b"") == b"1"


async def test_the_restrictions_are_empty_until_an_actor_has_started_and_after_it_is_gone() -> None:
    starts = Starts()
    place = ComputePlace(starts, gone=Gone)
    assert await place.confinement() == {}
    await place.call(b"")
    assert await place.confinement() == {"number": 1}
    starts.actors[0].is_gone = True
    assert await place.confinement() == {}
    assert await place.call(b"") == b"2"
