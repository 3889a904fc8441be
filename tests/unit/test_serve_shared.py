"""Work that callers share: done once, kept for the next caller, and bounded if no caller waits."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.shared import Shared


class Making:
    """Counted work that ends on request."""

    def __init__(self, outcome: bytes | Exception = b"made") -> None:
        self.begun = 0
        self.cancelled = 0
        self.go_on = asyncio.Event()
        self._outcome = outcome

    async def __call__(self) -> bytes:
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


async def leave(asked: asyncio.Task[bytes]) -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked


async def test_callers_of_one_key_share_the_work_and_one_who_leaves_ends_nothing() -> None:
    shared, making = Shared[bytes](), Making()
    first, second, third = (asyncio.create_task(shared.get(b"key", making)) for _ in range(3))
    await leave(second)
    making.go_on.set()
    assert await asyncio.gather(first, third) == [b"made", b"made"]
    assert making.begun == 1
    assert await shared.get(b"key", making) == b"made" and making.begun == 2, "what was heard is not kept here"


@pytest.mark.parametrize(
    ("outcome", "is_kept"),
    [
        (b"made", True),
        (Refused(Reason.DATA_INVALID, "no text in it"), True),
        (Refused(Reason.INSPECTION_UNAVAILABLE, "not now", retry_after_s=1.0), False),
        (RuntimeError("a defect"), False),
    ],
)
async def test_an_outcome_that_no_caller_waited_for_is_given_to_the_next_caller(
    outcome: bytes | Exception, is_kept: bool
) -> None:
    shared, making = Shared[bytes](), Making(outcome)
    await leave(asyncio.create_task(shared.get(b"key", making)))
    making.go_on.set()
    await asyncio.sleep(0.01)
    again = (await asyncio.gather(shared.get(b"key", making), return_exceptions=True))[0]
    assert str(again) == str(outcome) and making.begun == (1 if is_kept else 2)


async def test_a_defect_that_no_caller_waited_for_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared, making = Shared[bytes](), Making(RuntimeError("a defect"))
    await leave(asyncio.create_task(shared.get(b"key", making)))
    making.go_on.set()
    await asyncio.sleep(0.01)
    assert "RuntimeError: a defect" in caplog.text


async def test_work_that_everybody_has_left_is_bounded_and_what_is_waited_for_is_not() -> None:
    shared, making = Shared[bytes](most_left=2), Making()
    waits = [asyncio.create_task(shared.get(b"%d" % number, making)) for number in range(6)]
    for asked in waits[:4]:
        await leave(asked)
    await asyncio.sleep(0)
    assert (making.begun, making.cancelled) == (6, 2)
    making.go_on.set()
    assert await asyncio.gather(*waits[4:]) == [b"made", b"made"]
    fresh = asyncio.create_task(shared.get(b"3", making))
    assert await fresh == b"made" and making.begun == 7, "cancelled work starts again"
