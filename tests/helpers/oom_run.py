"""A gang in a memory group of its own, one rank of which takes more than there is: prints its failure report as JSON.

`python -m helpers.oom_run FOLDER GROUP`: GROUP is a limited group, which this process and its gang join.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from google.protobuf.json_format import MessageToJson

from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock


async def main(folder: Path, group: Path) -> None:
    """Plays it."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    launcher = LocalLauncher(clock=SystemClock(), cpus=2, program="helpers.fake_trainer")
    launch = fake_launch(folder, Script(steps=100, deaths={"1": [3, "balloon"]}))
    await launcher.ensure(launch)
    for event in await collect(launcher, launch.key):
        if event.WhichOneof("payload") == "failure":
            print(MessageToJson(event.failure, indent=None))
    await launcher.close(stop_cluster=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
