"""A service with a real door and store over a scripted cluster: `python -m helpers.serving_run FOLDER ADDRESS`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from helpers.scripted_launcher import ScriptedLauncher
from helpers.service import serving_store
from helpers.stores import store_at
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.app import make_door
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.store.store import open_store


async def main(folder: Path, address: str) -> int:
    clock = SystemClock()
    door = make_door(Limits(), Access(Authentication(), clock))
    port = await door.start(address)
    store = await open_store(store_at(folder), clock, NullTrace())
    roots = (str(folder / "data"),)
    parts = {"clock": clock, "launcher": ScriptedLauncher(), "data_roots": roots, "door": (door, port)}
    async with serving_store(store, folder, **parts):
        failure = await store.failed
        print(failure, file=sys.stderr, flush=True)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[2])))
