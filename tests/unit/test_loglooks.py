"""Followers of logs are woken whatever becomes of the folder of another job."""

from __future__ import annotations

import asyncio
from pathlib import Path

from helpers.clock import ManualClock
from helpers.stores import store_at
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.serve.fanout import Fanout, logs_of
from shardyard_coordinator.serve.loglooks import LogLooks
from shardyard_coordinator.store.store import open_store


async def test_a_folder_that_cannot_be_looked_at_keeps_no_other_job_from_being_woken(tmp_path: Path) -> None:
    logs = tmp_path / "job" / "e1" / "logs"
    logs.mkdir(parents=True)
    store = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    fanout = Fanout(store)
    looks = LogLooks(fanout, 0.01)
    try:
        with looks.following("odd", tmp_path / ("x" * 300)), looks.following("job", tmp_path / "job"):
            for number in range(3):
                with fanout.interest(logs_of("job")) as waiter:
                    with (logs / "rank-0.stderr.log").open("a") as log:
                        log.write(f"line {number}\n")
                    async with asyncio.timeout(5):
                        await waiter
    finally:
        fanout.close()
        await store.close()
