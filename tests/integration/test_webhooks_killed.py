"""A service that is killed with -9 while it delivers: the receiver has every event in order, each once by its id."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from helpers.receivers import Listening, receiver
from helpers.repository import ROOT
from helpers.stores import of_child

ON_BOTH_STORES = True

# Killed after an answer and before it is recorded, after it is recorded, and from outside.
LIVES = (("webhook.answered", 5), ("webhook.delivered", 7), ("webhook.answered", 1), ("-", 4), ("-", 0))


async def test_every_event_arrives_in_order_however_often_the_service_is_killed(tmp_path: Path) -> None:
    with receiver() as listening:
        listening.hold_s = 0.01
        for point, nth in LIVES:
            await _live(tmp_path, listening, point, nth)
        ids = [request.id for request in listening.received]
    accepted = listening.accepted
    assert len(accepted) == 30 < len(ids)
    sequences = [int(each.rpartition("-")[2]) for each in accepted]
    assert sequences == list(range(1, 31))
    # What came again came at once, not from the beginning.
    assert len(ids) <= 30 + len(LIVES) and [each for at, each in enumerate(ids) if each not in ids[:at]] == accepted


async def _live(folder: Path, listening: Listening, point: str, nth: int) -> None:
    """One process: it ends itself, or is ended after so many more requests; 0: when all events have arrived."""
    command = [sys.executable, "-m", "helpers.delivering_run", str(folder), listening.url, point, str(nth)]
    environment = {**os.environ, **of_child(folder), "PYTHONPATH": str(ROOT / "tests")}
    child = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT)
    before = len(listening.received)
    async with asyncio.timeout(600):
        if point == "-":
            while (len(listening.received) < before + nth) if nth else (len(listening.accepted) < 30):
                await asyncio.sleep(0.01)
            child.kill()
        await child.wait()
