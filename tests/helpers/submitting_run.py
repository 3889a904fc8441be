"""Submits as fast as it can and says which jobs were acknowledged, until it is killed.

`python -m helpers.submitting_run FOLDER PREFIX`
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from helpers.core import ACTOR, new_job
from helpers.stores import store_at
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import submissions
from shardyard_coordinator.store.store import Store, open_store


async def main(folder: Path, prefix: str) -> None:
    store = await open_store(store_at(folder), SystemClock(), NullTrace())
    await asyncio.gather(*(caller(store, f"{prefix}-{number}") for number in range(16)))


async def caller(store: Store, prefix: str) -> None:
    for number in range(1_000_000):
        new = new_job(f"{prefix}-{number}", request_id=f"{prefix}-{number}", fingerprint=b"same")
        created = await store.write(lambda conn, new=new: submissions.create_job(conn, new, ACTOR, 1), ACTOR)
        print(created.job.uid, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
