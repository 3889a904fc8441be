"""Gangs as real subprocesses: order, deaths, directives, and what is left when the coordinator dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.fake_trainer import Script
from helpers.full_disk import no_room_for
from helpers.launches import TESTS, collect, fake_launch, gone, kinds, pids
from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.launch.protocols import Presence, StorageFailed
from shardyard_coordinator.launch.spool import SPOOL_NAME, read_spool
from shardyard_coordinator.seams import SystemClock

ENVIRONMENT = {"PYTHONPATH": str(TESTS)}


@pytest.fixture
async def launcher() -> AsyncIterator[LocalLauncher]:
    local = LocalLauncher(clock=SystemClock(), cpus=2, program="helpers.fake_trainer", environment=ENVIRONMENT)
    await local.start()
    yield local
    await local.close(stop_cluster=True)


async def test_a_gang_of_two_reports_in_order_and_ends_well(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=3))
    await launcher.ensure(launch)
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key)
    assert kinds(events) == ["ready", "resumed", *["progress"] * 3, "finished", "ended"]
    assert events[-1].ended.ok
    assert await launcher.lookup(launch.key) == Presence.ALIVE
    await launcher.kill(launch.key)
    assert await launcher.lookup(launch.key) == Presence.DEAD
    assert len(read_spool(Path(launch.attempt_dir) / SPOOL_NAME, after=0)) == 7


DEATHS = [
    ("kill", "WORKER_LOST", {"signal": "SIGKILL"}),
    ("exit", "UNKNOWN", {"exit_code": "3"}),
    ("report", "DATA_ERROR", {}),
]


@pytest.mark.parametrize(("how", "reason", "metadata"), DEATHS, ids=[row[0] for row in DEATHS])
async def test_the_rank_that_fails_first_is_named(
    launcher: LocalLauncher, tmp_path: Path, how: str, reason: str, metadata: dict[str, str]
) -> None:
    launch = fake_launch(tmp_path, Script(steps=50, step_s=0.01, deaths={"1": [3, how]}))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key)
    failures = [event.failure for event in events if event.WhichOneof("payload") == "failure"]
    assert [(failure.reason, failure.rank, failure.step, failure.attempt) for failure in failures] == [
        (reason, 1, 2, 1)
    ]
    assert dict(failures[0].metadata) == metadata
    assert "rank 1 dies at step 3" in failures[0].log_tail
    assert kinds(events)[-1] == "ended"
    assert not events[-1].ended.ok


async def test_a_rank_that_hangs_after_its_peer_died_is_ended(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(deaths={"0": [2, "kill"], "1": [2, "wait"]}))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key)
    assert [event.failure.rank for event in events if event.WhichOneof("payload") == "failure"] == [0]


async def test_a_rank_that_a_signal_stops_is_named_until_it_runs_again(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.005))
    await launcher.ensure(launch)
    stopped = pids(await collect(launcher, launch.key, until="progress"))[1]
    os.kill(stopped, signal.SIGSTOP)
    begun = (events := await collect(launcher, launch.key, until="condition"))[-1].condition
    assert (begun.type, begun.active) == (job_pb2.Condition.TYPE_STALLED, True)
    assert f"rank 1 (process {stopped})" in begun.message and f"`kill -CONT {stopped}`" in begun.message
    os.kill(stopped, signal.SIGCONT)
    over = (await collect(launcher, launch.key, after=len(events), until="condition"))[-1].condition
    assert (over.type, over.active) == (job_pb2.Condition.TYPE_STALLED, False)


async def test_a_directive_stops_the_gang_at_a_step(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.005))
    await launcher.ensure(launch)
    await collect(launcher, launch.key, until="progress")
    directive = worker_pb2.Directive(action=worker_pb2.Directive.ACTION_STOP, reason="CANCELLED")
    await launcher.direct(launch.key, directive.SerializeToString())
    events = await collect(launcher, launch.key)
    assert kinds(events)[-2:] == ["stopped", "ended"]
    assert events[-2].stopped.reason == "CANCELLED"
    assert events[-1].ended.ok


async def test_a_killed_gang_is_gone_with_all_that_it_started(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01, leftover=True))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    meeting = Path(launch.attempt_dir) / "meeting"
    children = [int((meeting / f"child-{rank}").read_text()) for rank in range(2)]
    await launcher.kill(launch.key)
    for pid in [*pids(events), *children]:
        await gone(pid)
    assert await launcher.lookup(launch.key) == Presence.DEAD
    with pytest.raises(LookupError):
        await launcher.events_after(launch.key, 0, timeout_s=1.0, limit=1)
    await launcher.kill(launch.key)
    # Whoever killed it knows why: the spool says nothing of an end, nor of a failure.
    told = [worker_pb2.WorkerEvent.FromString(raw) for raw in read_spool(Path(launch.attempt_dir) / SPOOL_NAME, 0)]
    assert told and not {"failure", "ended"} & set(kinds(told))


async def test_ranks_see_only_the_threads_they_were_given_and_no_secret(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01), workers=1)
    await launcher.ensure(launch)
    [pid] = pids(await collect(launcher, launch.key, until="progress"))
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {b"OMP_NUM_THREADS=1", b"OMP_WAIT_POLICY=PASSIVE", b"DS_ACCELERATOR=cpu", b"NCCL_DEBUG=WARN"} <= set(
        environment
    )
    assert b"AWS_SECRET_ACCESS_KEY=secret" not in environment


async def test_the_caller_that_asked_for_a_gang_may_leave_while_it_starts(
    launcher: LocalLauncher, tmp_path: Path
) -> None:
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01), workers=3)
    asking = asyncio.create_task(launcher.ensure(launch))
    while await launcher.lookup(launch.key) is not Presence.ALIVE:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(10):
        await launcher.kill(launch.key)
    assert await launcher.lookup(launch.key) == Presence.DEAD


async def test_a_kill_that_is_given_up_leaves_the_gang_to_the_next(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01))
    await launcher.ensure(launch)
    ranks = pids(await collect(launcher, launch.key, until="progress"))
    killing = asyncio.create_task(launcher.kill(launch.key))
    await asyncio.sleep(0)
    killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    async with asyncio.timeout(10):
        await launcher.close(stop_cluster=True)
    for pid in ranks:
        await gone(pid)


async def test_a_folder_that_cannot_be_made_is_the_storages_failure(launcher: LocalLauncher, tmp_path: Path) -> None:
    launch = fake_launch(tmp_path, Script())
    folder = Path(launch.attempt_dir)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(StorageFailed) as failed:
        await launcher.ensure(launch)
    assert failed.value.cause is Cause.STORAGE_NOT_WRITABLE
    assert await launcher.lookup(launch.key) == Presence.ABSENT


@pytest.mark.parametrize(
    ("allowed", "count", "seen"),
    [("", 2, [b"0", b"1"]), ("3,5,7", 2, [b"3", b"5"]), ("GPU-a,GPU-b", None, [])],
)
async def test_ranks_share_the_gpus_that_the_service_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: str, count: int | None, seen: list[bytes]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    local = LocalLauncher(
        clock=SystemClock(), gpus=count, program="helpers.fake_trainer", environment=ENVIRONMENT, settle_s=0.05
    )
    [node] = (await local.cluster()).nodes
    assert node.gpus == len(seen)
    if not seen:
        return
    for _ in range(2):
        launch = replace(fake_launch(tmp_path, Script(steps=10_000, step_s=0.01)), gpus_per_worker=1)
        await local.ensure(launch)
        ranks = pids(await collect(local, launch.key, until="progress"))
        told = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks]
        assert [b"CUDA_VISIBLE_DEVICES=" + name for name in seen] == [
            next(each for each in environment if each.startswith(b"CUDA_VISIBLE_DEVICES=")) for environment in told
        ]
        await local.kill(launch.key)


async def test_a_gang_whose_spool_has_no_room_ends_and_says_so(tmp_path: Path) -> None:
    launcher = LocalLauncher(
        clock=SystemClock(), cpus=2, program="helpers.fake_trainer", environment=ENVIRONMENT, patience_s=0.0
    )
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    spool = Path(launch.attempt_dir) / SPOOL_NAME
    with no_room_for(spool):
        for pid in pids(events):
            await gone(pid)
    told = await collect(launcher, launch.key, after=events[-1].sequence)
    assert [event.failure.reason for event in told if event.HasField("failure")] == ["STORAGE_FULL"]
    await launcher.close(stop_cluster=True)


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, pids
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock

async def main():
    launcher = LocalLauncher(clock=SystemClock(), program="helpers.fake_trainer")
    launch = fake_launch(Path(sys.argv[1]), Script(steps=10_000, step_s=0.01))
    await launcher.ensure(launch)
    events = await collect(launcher, launch.key, until="progress")
    print(launch.attempt_dir, *pids(events), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_gang_ends_with_its_coordinator_and_its_spool_stays(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert process.stdout is not None
    folder, *ranks = (await asyncio.to_thread(process.stdout.readline)).split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in ranks:
        await gone(int(pid))
    events = [worker_pb2.WorkerEvent.FromString(raw) for raw in read_spool(Path(folder) / "spool.bin", after=0)]
    assert kinds(events)[:3] == ["ready", "resumed", "progress"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
