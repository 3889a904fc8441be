"""Turns at something scarce: who comes next, and what no caller can hold."""

from __future__ import annotations

import asyncio

import pytest

from shardyard_coordinator.launch.turns import TooManyWaiting, Turns


async def queue(turns: Turns, caller: tuple[str, ...], order: list[str], name: str, until: asyncio.Event) -> None:
    async with turns.turn(caller):
        order.append(name)
        await until.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_least_recently_served_comes_next_on_every_level() -> None:
    turns, order, done = Turns(1), [], asyncio.Event()
    asked = [("a", "1"), ("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("b", "1")]
    tasks = [
        asyncio.create_task(queue(turns, caller, order, "".join(caller), done)) for caller in asked
    ]  # fmt: skip
    await settle()
    done.set()
    await asyncio.gather(*tasks)
    assert order == ["a1", "b1", "a2", "b1", "a1", "a1"]


async def test_one_caller_never_holds_the_last_place() -> None:
    turns, order, done = Turns(2), [], asyncio.Event()
    tasks = [asyncio.create_task(queue(turns, ("a",), order, "a", done)) for _ in range(5)]
    await settle()
    assert order == ["a"]
    tasks.append(asyncio.create_task(queue(turns, ("b",), order, "b", done)))
    await settle()
    assert order == ["a", "b"]
    done.set()
    await asyncio.gather(*tasks)
    assert order.count("a") == 5


async def test_a_caller_that_leaves_takes_no_turn_and_loses_none_for_others() -> None:
    turns, order, done = Turns(1), [], asyncio.Event()
    first = asyncio.create_task(queue(turns, ("a",), order, "first", done))
    await settle()
    gone = asyncio.create_task(queue(turns, ("b",), order, "gone", done))
    last = asyncio.create_task(queue(turns, ("c",), order, "last", done))
    await settle()
    gone.cancel()
    done.set()
    await asyncio.gather(first, last)
    assert order == ["first", "last"] and gone.cancelled()


async def test_a_caller_may_only_have_so_many_waiting() -> None:
    turns, done = Turns(1, most_waiting=2), asyncio.Event()
    tasks = [asyncio.create_task(queue(turns, ("a",), [], "a", done)) for _ in range(3)]
    await settle()
    with pytest.raises(TooManyWaiting):
        async with turns.turn(("a",)):
            pass
    other = asyncio.create_task(queue(turns, ("b",), [], "b", done))
    done.set()
    await asyncio.gather(*tasks, other)
    assert all(task.done() for task in tasks)
