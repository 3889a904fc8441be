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


async def main(folder: Path, prefix: str) -> int:
    """Returns the exit code of the store's failure, if it fails, and says why."""
    store = await open_store(store_at(folder), SystemClock(), NullTrace())
    callers = asyncio.gather(*(caller(store, f"{prefix}-{number}") for number in range(16)), return_exceptions=True)
    failure = await store.failed
    callers.cancel()
    print(failure, file=sys.stderr, flush=True)
    return failure.exit_code


async def caller(store: Store, prefix: str) -> None:
    for number in range(1_000_000):
        new = new_job(f"{prefix}-{number}", request_id=f"{prefix}-{number}", fingerprint=b"same")
        created = await store.write(lambda conn, new=new: submissions.create_job(conn, new, ACTOR, 1), ACTOR)
        print(created.job.uid, flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[2])))
