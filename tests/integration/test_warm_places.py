"""Where there is a server of warm ranks: in folders of all kinds, and not where ranks may read it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers.warm import ENVIRONMENT
from shardyard_coordinator.launch.allowed import Folders
from shardyard_coordinator.launch.fork_server import SOCKET
from shardyard_coordinator.launch.process_compute import ProcessCompute
from shardyard_coordinator.launch.protocols import ComputeUnavailable

IN_A_CLOSED_FOLDER = """
import asyncio, ctypes, os, sys
from pathlib import Path
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch
from helpers.warm import ENVIRONMENT, warm_server
from shardyard_coordinator.launch.confine import drop_capabilities
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock

async def main():
    for right_to_all_files in (1, 2):
        ctypes.CDLL(None).prctl(24, right_to_all_files, 0, 0, 0)
    drop_capabilities(0)
    os.chmod(".", 0)
    state = Path(sys.argv[1])
    compute = await warm_server(state)
    launcher = LocalLauncher(
        clock=SystemClock(), cpus=2, program="helpers.fake_trainer", environment=ENVIRONMENT, hidden=str(state)
    )
    launch = fake_launch(state, Script(steps=3))
    await launcher.ensure(launch)
    ready = (await collect(launcher, launch.key, until="ready", timeout_s=120))[-1].ready
    print(ready.warm, *ready.cold)
    await launcher.close(stop_cluster=True)
    await compute.close()

asyncio.run(main())
"""


def test_ranks_start_warm_in_a_folder_that_the_account_may_not_enter(tmp_path: Path) -> None:
    # As with `sudo -u shardyard shardyard serve` in the home folder of root.
    for name in ("closed", "state"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CLOSED_FOLDER, str(tmp_path / "state")],
        cwd=tmp_path / "closed",
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2"], done
    (tmp_path / "closed").chmod(0o700)


def test_no_server_where_ranks_may_read_its_folder(tmp_path: Path) -> None:
    state = tmp_path / "home" / "state"
    state.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert Folders(reads=(str(state / "storage"), str(tmp_path / "data")), hidden=str(state)).ranks
    for root in (tmp_path / "home", tmp_path / "link", state, Path("/")):
        assert not Folders(reads=(str(root),), hidden=str(state)).ranks


async def test_a_state_folder_without_sockets_is_said_once_and_ranks_start_cold(tmp_path: Path) -> None:
    # A file in the place of the folder stands for file systems that have no sockets, and for a full disk.
    (tmp_path / "warm").write_text("")
    compute = ProcessCompute(
        log=tmp_path / "compute.log",
        folders=Folders(hidden=str(tmp_path)),
        warm=[],
        environment=ENVIRONMENT,
        warm_ranks=[],
    )
    await compute.start()
    log = tmp_path / "compute.log"
    async with asyncio.timeout(60):
        while not log.exists() or "ranks start cold" not in log.read_text():
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.5)  # It tries again, and says nothing new.
    (tmp_path / "warm").unlink()
    async with asyncio.timeout(60):
        while not (tmp_path / "warm" / SOCKET).exists():
            await asyncio.sleep(0.05)
    assert log.read_text().count("ranks start cold") == 1
    await compute.close()


async def test_an_inspection_without_a_process_is_unavailable_and_ends_no_other(tmp_path: Path) -> None:
    no_forks, others = tmp_path / "no-forks", set(psutil.Process().children())
    compute = ProcessCompute(
        log=tmp_path / "compute.log",
        warm=["helpers.odd_forks"],
        environment=ENVIRONMENT | {"NO_FORKS": str(no_forks)},
    )

    async def look() -> int:
        return int(await compute.inspect("helpers.odd_forks:pid", b"", caller=("local", "me"), cpu_s=20))

    await compute.start()
    try:
        assert await look() > 0
        [warm] = set(psutil.Process().children()) - others
        no_forks.touch()
        with pytest.raises(ComputeUnavailable, match="no process could be started: Resource temporarily unavailable"):
            await look()
        no_forks.unlink()
        assert await look() > 0 and warm.is_running()
    finally:
        await compute.close()
