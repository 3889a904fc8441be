"""Ranks as forks of a warm process: they end as others do, can do no more than others, and nobody else starts one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from helpers.confined import is_warm, looking_launch
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, gone, kinds, pids
from helpers.warm import ENVIRONMENT, answer_to, started, warm_server
from shardyard_coordinator.launch.confine import landlock_version
from shardyard_coordinator.launch.fork_server import SOCKET, in_folder, open_folder
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock


@pytest.fixture(scope="module")
async def state(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A state folder whose path is too long for a socket's address, with a server that is ready."""
    folder = tmp_path_factory.mktemp("state") / ("long" * 25)
    folder.mkdir()
    compute = await warm_server(folder)
    yield folder
    await compute.close()


@pytest.fixture
async def launcher(state: Path) -> AsyncIterator[LocalLauncher]:
    local = LocalLauncher(
        clock=SystemClock(), cpus=2, program="helpers.fake_trainer", environment=ENVIRONMENT, hidden=str(state)
    )
    yield local
    await local.close(stop_cluster=True)


async def test_a_warm_gang_reports_in_order_and_ends_well(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=30, step_s=0.02))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    ranks = pids(events)
    assert len(ranks) == 2 and all(is_warm(psutil.Process(pid)) for pid in ranks)
    assert all(os.getsid(pid) == pid for pid in ranks)
    events += await collect(launcher, launch.key, after=events[-1].sequence)
    assert kinds(events) == ["ready", "resumed", *["progress"] * 30, "finished", "ended"]
    assert events[-1].ended.ok
    for pid in ranks:
        await gone(pid)


@pytest.mark.parametrize(
    ("how", "reason", "metadata"),
    [
        ("kill", "WORKER_LOST", {"signal": "SIGKILL"}),
        ("exit", "UNKNOWN", {"exit_code": "3"}),
        ("report", "DATA_ERROR", {}),
    ],
)
async def test_the_end_of_a_warm_rank_is_told_as_that_of_any_other(
    launcher: LocalLauncher, tmp_path: Path, how: str, reason: str, metadata: dict[str, str]
) -> None:
    launch = fake_launch(tmp_path, Script(steps=50, step_s=0.01, deaths={"1": [3, how]}))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key)
    failures = [event.failure for event in events if event.WhichOneof("payload") == "failure"]
    assert [(failure.reason, failure.rank) for failure in failures] == [(reason, 1)]
    assert dict(failures[0].metadata) == metadata
    assert "rank 1 dies at step 3" in failures[0].log_tail


async def test_a_killed_warm_gang_is_gone_with_all_that_it_started(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01, leftover=True))
    await launcher.ensure(launch)
    ranks = pids(await collect(launcher, launch.key, until="progress"))
    assert all(is_warm(psutil.Process(pid)) for pid in ranks)
    meeting = Path(launch.attempt_dir) / "meeting"
    children = [int((meeting / f"child-{rank}").read_text()) for rank in range(2)]
    await launcher.kill(launch.key)
    for pid in [*ranks, *children]:
        await gone(pid)


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, pids
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock

async def main():
    launcher = LocalLauncher(clock=SystemClock(), program="helpers.fake_trainer", hidden=sys.argv[2])
    launch = fake_launch(Path(sys.argv[1]), Script(steps=10_000, step_s=0.01, leftover=True))
    await launcher.ensure(launch)
    ranks = pids(await collect(launcher, launch.key, until="progress"))
    children = [(Path(launch.attempt_dir) / "meeting" / f"child-{rank}").read_text() for rank in range(2)]
    print(*ranks, *children, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_warm_gang_ends_with_its_coordinator(state: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(tmp_path), str(state)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
    )
    assert process.stdout is not None
    begun = [int(pid) for pid in (await asyncio.to_thread(process.stdout.readline)).split()]
    assert len(begun) == 4 and all(is_warm(psutil.Process(pid)) for pid in begun[:2])
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in begun:
        await gone(pid)


async def test_a_gang_outlives_the_server_and_the_next_one_starts_without_it(
    tmp_path: Path,
) -> None:
    compute = await warm_server(tmp_path)
    launcher = LocalLauncher(
        clock=SystemClock(), cpus=2, program="helpers.fake_trainer", environment=ENVIRONMENT, hidden=str(tmp_path)
    )
    try:
        first = fake_launch(tmp_path, Script(steps=100, step_s=0.02))
        await launcher.ensure(first)
        events = await collect(launcher, first.key, until="progress")
        assert all(is_warm(psutil.Process(pid)) for pid in pids(events))
        await compute.close()
        second = fake_launch(tmp_path, Script(steps=3))
        await launcher.ensure(second)
        found = await collect(launcher, second.key)
        assert found[-1].ended.ok
        events += await collect(launcher, first.key, after=events[-1].sequence)
        assert events[-1].ended.ok and kinds(events).count("progress") == 100
    finally:
        await compute.close()
        await launcher.close(stop_cluster=True)


async def test_who_cannot_open_the_servers_folder_has_nothing_started(state: Path, tmp_path: Path) -> None:
    forged, log = tmp_path / "warm", tmp_path / "out"
    forged.mkdir()
    os.link(state / "warm" / SOCKET, forged / SOCKET)
    assert await started(forged, log) is None
    assert not log.read_bytes()
    # With no more than the path, as a confined rank may have the folder.
    answer = answer_to(state / "warm", {}, how=os.O_PATH)
    assert answer == {"refused": "the order comes without the folder of this server"}
    assert (state / "warm").stat().st_mode & 0o077 == 0


async def test_a_caller_that_sends_nothing_or_nonsense_delays_no_other(
    state: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    callers = []
    for sent in (b"", b"\0", b"\0\0\0\0\5hello", b"\0\xff\xff\xff\xff"):
        caller = socket.socket(socket.AF_UNIX)
        with open_folder(state / "warm") as opened:
            caller.connect(f"{in_folder(opened)}/{SOCKET}")
        caller.sendall(sent)
        callers.append(caller)
    launch = fake_launch(tmp_path, Script(steps=20, step_s=0.02))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    assert all(is_warm(psutil.Process(pid)) for pid in pids(events))
    for caller in callers:
        caller.close()


@pytest.mark.skipif(landlock_version() < 2, reason="the kernel's Landlock has no rules for ranks")
async def test_a_warm_rank_opens_no_more_than_a_cold_one(state: Path, tmp_path: Path) -> None:
    storage, root = state / "storage", tmp_path / "root"
    root.mkdir()
    (root / "rows.csv").write_text("text")
    others = storage / "models" / "others"
    denied, done = "PermissionError", "done"
    rows = [
        ("start", Path(), "warm"),
        ("read", root / "rows.csv", done),
        ("read", others / "config.json", done),
        ("list", state / "warm", denied),
        ("order", state / "warm", "refused"),
        ("signal", Path(str(os.getpid())), denied if landlock_version() >= 6 else done),
        ("descriptors", Path(), "4"),
        ("read", Path("/etc/passwd"), denied),
        ("read", Path(f"/proc/{os.getpid()}/environ"), denied),
        ("list", tmp_path, denied),
        ("write", storage / "jobs" / "one" / "notes", done),
        ("write", root / "rows.csv", denied),
        ("write", others / "config.json", denied),
        ("temporary", Path(), done),
        ("meet", Path(), done),
        ("put", storage / "models" / "mine", done),
    ]
    launcher = LocalLauncher(
        clock=SystemClock(), cpus=1, program="helpers.looking_rank", environment=ENVIRONMENT, hidden=str(state)
    )
    launch = looking_launch(storage, root, [(verb, path) for verb, path, _ in rows])
    await launcher.ensure(launch)
    try:
        await collect(launcher, launch.key)
        seen = json.loads((Path(launch.attempt_dir) / "seen.json").read_text())
        assert {f"{verb} {path}": found for (verb, path, _), found in zip(rows, seen, strict=True)} == {
            f"{verb} {path}": expected for verb, path, expected in rows
        }
    finally:
        await launcher.close(stop_cluster=True)
