"""Submissions to a store on PostgreSQL while the replies of its COMMITs are lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import Connection, func, select

from helpers.core import ACTOR, new_job
from helpers.eating_proxy import eating_proxy
from helpers.postgres import Server
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import EventRecord
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import submissions, tables
from shardyard_coordinator.store.store import Store, open_store


@asynccontextmanager
async def opened(at: str | Path) -> AsyncIterator[Store]:
    """A store that is closed at the end."""
    store = await open_store(at, SystemClock(), NullTrace())
    try:
        yield store
    finally:
        await store.close()


async def submit(store: Store, job_id: str) -> str:
    """The uid of the job; repeated with the same request id while the store is away."""
    new = new_job(job_id, request_id=job_id, fingerprint=b"same")
    while True:
        try:
            made = await store.write(lambda conn: submissions.create_job(conn, new, ACTOR, 1), ACTOR)
        except Refused as refused:
            assert refused.reason in (Reason.STORE_UNAVAILABLE, Reason.STORE_BUSY), refused
            await asyncio.sleep(0.1)
        else:
            return str(made.job.uid)


def num_jobs(conn: Connection) -> int:
    return int(conn.execute(select(func.count()).select_from(tables.job)).scalar_one())


async def commit_through(server: Server, url: str, *, eaten: int, rng: random.Random) -> tuple[int, int]:
    """Submits until that many COMMITs were lost, some before and some after the server has heard them.

    Answers how many were lost, and how many jobs there are; each was told once, with its first event.
    """
    eats, told = [False], list[EventRecord]()

    def fate() -> str:
        return rng.choice(["", "before", "after"]) if eats[0] else ""

    with eating_proxy(server.port, fate) as proxy:
        async with opened(url.replace(f":{server.port}/", f":{proxy.port}/")) as store:
            store.subscribe(told.extend)
            eats[0] = True
            uids: list[str] = []
            while proxy.eaten < eaten:
                at = len(uids)
                uids += await asyncio.gather(*(submit(store, f"job-{each}") for each in range(at, at + 4)))
            eats[0] = False
            assert await store.read(num_jobs) == len(uids) == len(set(uids))
            assert sorted((event.job_uid, event.sequence) for event in told) == sorted((uid, 1) for uid in uids)
            return proxy.eaten, len(uids)
