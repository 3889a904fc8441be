"""Launches of the fake trainer, and what their events say."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import psutil

from helpers.fake_trainer import Script
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.protocols import AttemptKey, Launch, Launcher

TESTS = Path(__file__).parent.parent


def fake_launch(
    storage: Path, script: Script, *, workers: int = 2, epoch: int = 1, placement: tuple[tuple[str, int], ...] = ()
) -> Launch:
    """A gang of the fake trainer in a job of its own."""
    job_uid = uuid.uuid4().hex[:12]
    folder = storage / "jobs" / job_uid / f"e{epoch:06}"
    script.write(folder)
    spec = worker_pb2.AttemptSpec(
        job_uid=job_uid,
        epoch=epoch,
        job_dir=str(folder.parent),
        attempt_dir=str(folder),
        world_size=workers,
        threads_per_rank=1,
        rendezvous=f"file://{folder}/rendezvous",
    )
    return Launch(AttemptKey(job_uid, epoch), spec.SerializeToString(), str(folder), workers, 1, 0, placement)


async def collect(
    launcher: Launcher, key: AttemptKey, *, after: int = 0, until: str = "ended", timeout_s: float = 30.0
) -> list[worker_pb2.WorkerEvent]:
    """The events after `after`, up to the first of kind `until`; checks that they are dense."""
    events: list[worker_pb2.WorkerEvent] = []
    async with asyncio.timeout(timeout_s):
        while True:
            for raw in await launcher.events_after(key, after, timeout_s=5.0, limit=100):
                event = worker_pb2.WorkerEvent.FromString(raw)
                after += 1
                assert event.sequence == after
                events.append(event)
                if event.WhichOneof("payload") == until:
                    return events
                assert event.WhichOneof("payload") != "ended", kinds(events)


def kinds(events: list[worker_pb2.WorkerEvent]) -> list[str]:
    """What each event is."""
    return [str(event.WhichOneof("payload")) for event in events]


def pids(events: list[worker_pb2.WorkerEvent]) -> list[int]:
    """The process of each rank, as the gang said when it was ready."""
    return next(list(event.ready.pids) for event in events if event.WhichOneof("payload") == "ready")


def supervisor_of(launch: Launch) -> psutil.Process:
    """The process on this machine that has an attempt's spool open."""
    spool = str(Path(launch.attempt_dir) / "spool.bin")
    [found] = [
        process
        for process in psutil.process_iter()
        if "Supervisor" in process.name() and spool in [file.path for file in process.open_files()]
    ]
    return found


def listeners(*roots: psutil.Process) -> list[tuple[str, str]]:
    """(process, address) of each socket that a process of these trees listens on."""
    tree = {process.pid: process for root in roots for process in [root, *root.children(recursive=True)]}
    return [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in tree.values()
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        for connection in process.net_connections(kind="inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    ]


def runs(pid: int) -> bool:
    """Whether a process is more than an entry that its parent has not taken away yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(pid: int, timeout_s: float = 10.0) -> None:
    """Waits until a process runs no more."""
    async with asyncio.timeout(timeout_s):
        while runs(pid):
            await asyncio.sleep(0.01)
