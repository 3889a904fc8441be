"""What was acknowledged is there after `kill -9`, again and again on the same store."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

from sqlalchemy import Connection, select

from helpers.repository import ROOT
from helpers.stores import of_child, store_at
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.store import open_store

ON_BOTH_STORES = True

KILLS = 8


async def test_no_acknowledged_job_is_lost_to_a_kill_and_none_is_there_twice(tmp_path: Path) -> None:
    rng = random.Random(11)
    acknowledged: list[str] = []
    for kill in range(KILLS):
        acknowledged += await _submit_until_killed(tmp_path, f"k{kill}", after=rng.randrange(1, 300))
    store = await open_store(store_at(tmp_path), SystemClock(), NullTrace())
    uids, requests, firsts = await store.read(_everything)
    await store.close()
    assert len(acknowledged) >= KILLS
    assert set(acknowledged) <= set(uids)
    assert len(uids) == len(set(uids)) == len(requests) == len(firsts)
    assert set(firsts) == set(uids)


def _everything(conn: Connection) -> tuple[list[str], list[str], list[str]]:
    uids = list(conn.execute(select(tables.job.c.uid)).scalars())
    requests = list(conn.execute(select(tables.request.c.request_id)).scalars())
    first = select(tables.event.c.job_uid).where(tables.event.c.sequence == 1)
    return uids, requests, list(conn.execute(first).scalars())


async def _submit_until_killed(folder: Path, prefix: str, *, after: int) -> list[str]:
    """Kills the submitter after its n-th acknowledgement; answers all that it printed."""
    command = [sys.executable, "-m", "helpers.submitting_run", str(folder), prefix]
    environment = {**os.environ, **of_child(folder), "PYTHONPATH": str(ROOT / "tests")}
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT, stdout=pipe)
    assert child.stdout is not None
    lines = []
    async with asyncio.timeout(60):
        while len(lines) < after and (line := await child.stdout.readline()):
            lines.append(line)
        child.kill()
        lines += (await child.stdout.read()).splitlines(keepends=True)
        await child.wait()
    return [line.decode().strip() for line in lines if line.endswith(b"\n")]
