"""What is asked at once is made together; who has gone is left out, and trouble of the store is said as such."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from helpers.clock import ManualClock
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store.store import open_store
from shardyard_coordinator.store.together import Together, reads_together


class Slow:
    """Answers each item with itself, once it may."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may = asyncio.Event()

    async def make(self, items: Sequence[int]) -> Sequence[int | Exception]:
        self.batches.append(list(items))
        await self.may.wait()
        return [ValueError(f"{item}") if item % 7 == 0 else item for item in items]


async def test_what_waits_is_one_batch_and_each_caller_gets_its_own_answer() -> None:
    slow = Slow()
    together = Together(slow.make)
    calls = [asyncio.create_task(together.ask(at)) for at in range(1, 100)]
    await asyncio.sleep(0)
    slow.may.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [len(batch) for batch in slow.batches] == [64, 35]
    for at, answer in enumerate(answers, 1):
        assert str(answer) == str(at) and isinstance(answer, ValueError) == (at % 7 == 0)


async def test_many_callers_out_of_step_share_few_batches() -> None:
    batches: list[int] = []

    async def make(items: Sequence[int]) -> Sequence[int | Exception]:
        batches.append(len(items))
        await asyncio.sleep(0)
        return items

    together = Together(make, gather_s=0.05)

    async def caller(number: int) -> None:
        for _ in range(20):
            for _ in range(number):
                await asyncio.sleep(0)  # A turn of the loop, so that each comes at a time of its own.
            assert await together.ask(number) == number

    await asyncio.gather(*map(caller, range(20)))
    assert sum(batches) == 400
    assert len(batches) < 100, batches


async def test_who_has_gone_before_its_turn_is_left_out() -> None:
    slow = Slow()
    together = Together(slow.make)
    first = asyncio.create_task(together.ask(1))
    await asyncio.sleep(0.01)
    gone, stays = asyncio.create_task(together.ask(2)), asyncio.create_task(together.ask(3))
    await asyncio.sleep(0.01)
    gone.cancel()
    slow.may.set()
    assert (await first, await stays) == (1, 3)
    assert slow.batches == [[1], [3]]


async def test_more_than_can_wait_are_refused_and_room_of_the_gone_is_given_again() -> None:
    slow = Slow()
    together = Together(slow.make)
    first = asyncio.create_task(together.ask(1))
    await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(together.ask(2)) for _ in range(1024)]
    await asyncio.sleep(0.01)
    with pytest.raises(Refused) as refused:
        await together.ask(2)
    assert refused.value.reason is Reason.OVERLOADED and refused.value.retry_after_s
    waiting[0].cancel()
    await asyncio.sleep(0.01)
    last = asyncio.create_task(together.ask(3))
    await asyncio.sleep(0.01)
    slow.may.set()
    assert (await first, await last) == (1, 3)
    await asyncio.gather(*waiting[1:])


async def test_every_reader_is_notified_of_a_busy_store(tmp_path: Path) -> None:
    def busy(_conn: Connection) -> None:
        error = sqlite3.OperationalError("scripted")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise OperationalError("SELECT", {}, error)

    store = await open_store(tmp_path / "store.db", ManualClock(), NullTrace())
    together = reads_together(store)
    found = await asyncio.gather(together.ask(busy), together.ask(lambda _conn: 1), return_exceptions=True)
    await store.close()
    for each in found:
        assert isinstance(each, Refused) and each.reason is Reason.STORE_BUSY
