"""The parts of `bench/scale.py` that run a coordinator: freed GPUs, events of many gangs, quiet followers, a start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import Connection

import scale_store
from helpers.core import new_job, running_core
from helpers.scripted_launcher import ScriptedGang, ScriptedLauncher
from helpers.service import PARENT, serving_store
from shardyard.v1 import log_service_pb2, metric_service_pb2
from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.launch.protocols import AttemptKey, Node
from shardyard_coordinator.scheduling.loop import SchedulingLoop
from shardyard_coordinator.seams import SYSTEM, NullTrace, SystemClock
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store import attempts, jobs
from shardyard_coordinator.store.store import open_store

Row = tuple[str, str, str]
FREED = 12
ROUNDS = 5
CPU_BEFORE_MS = 1.41


class PatientLauncher(ScriptedLauncher):
    """Answers a question for events when there are some, and never before."""

    async def events_after(self, key: AttemptKey, after: int, *, timeout_s: float, limit: int) -> list[bytes]:
        """See the class."""
        gang = self.gangs[key]
        while len(gang.events) <= after:
            gang.changed.clear()
            await gang.changed.wait()
        return [event.SerializeToString() for event in gang.events[after : after + limit]]


class NobodyFollows(Collector):
    """Records no events: what is measured is the loop."""

    def follow(self, key: AttemptKey) -> None:
        """Nothing."""


async def freed(folder: Path, count: int, *, nodes: int, gpus: int) -> tuple[list[float], int, float]:
    """Seconds until each GPU that came free was given away, the largest write-ahead log, the share of a core used."""
    database, clock, trace = folder / "store.db", SystemClock(), NullTrace()
    await (await open_store(database, clock, trace)).close()
    running = nodes * gpus
    scale_store.fill(database, scale_store.Size(ended=0, queued=count, running=running), slots=(1,))
    launcher = ScriptedLauncher(nodes=tuple(Node(f"node-{at}", "127.0.0.1", 64, gpus, 1 << 40) for at in range(nodes)))
    store = await open_store(database, clock, trace)
    collector = NobodyFollows(store, launcher, clock, trace, ControlSettings(storage=folder, store_id=store.store_id))
    loop = SchedulingLoop(store, launcher, collector, clock, trace)
    started = asyncio.Event()

    def hear(records: Sequence[EventRecord]) -> None:
        if any(record.kind is EventKind.ATTEMPT and record.job_uid not in ended for record in records):
            started.set()

    ended: set[str] = set()
    store.subscribe(hear)
    loop.start()
    took, wal = [], database.with_name(database.name + "-wal")
    largest = 0
    try:
        await asyncio.sleep(3)
        begun_cpu, begun = time.process_time(), time.perf_counter()
        for at in range(FREED):
            uid = scale_store.uid_of(count + at * 17)
            ended.add(uid)
            started.clear()
            await store.write(lambda conn, uid=uid: end(conn, uid, clock.now_us()), SYSTEM)
            since = time.perf_counter()
            async with asyncio.timeout(300):
                await started.wait()
            took.append(time.perf_counter() - since)
            largest = max(largest, wal.stat().st_size)
            await asyncio.sleep(1.5)
        share = (time.process_time() - begun_cpu) / (time.perf_counter() - begun)
    finally:
        await loop.close()
        await collector.close()
        await store.close()
    return took, largest, share


def end(conn: Connection, uid: str, now_us: int) -> None:
    """The gang of a running job is gone: its GPUs are free."""
    job, attempt = jobs.get_job_by_uid(conn, uid), attempts.require_attempt(conn, uid, 1)
    assert job is not None
    attempts.move_attempt(conn, job, attempt, AttemptState.ENDED, now_us=now_us)
    attempts.release_attempt(conn, uid, 1)
    jobs.move(conn, job, JobState.CANCELLING, now_us=now_us)


async def events(folder: Path, count: int) -> tuple[list[Row], bool]:
    """CPU of a report of progress and metrics, if that many gangs send one each per second."""
    launcher = PatientLauncher(nodes=(Node("node-1", "127.0.0.1", count, 0, 1 << 40),), script=ScriptedGang.canary)
    async with running_core(folder, launcher, start_timeout_s=600.0, poll_s=60.0) as core:
        made = [await core.submit(new_job(f"job-{at}")) for at in range(count)]
        for job in made:
            await core.until(job.uid, JobState.RUNNING, timeout_s=300)
        seen, enough = [0], asyncio.Event()

        def hear(records: Sequence[EventRecord]) -> None:
            seen[0] += sum(record.kind is EventKind.PROGRESS for record in records)
            if seen[0] >= ROUNDS * count:
                enough.set()

        core.store.subscribe(hear)
        begun_cpu, begun = time.process_time(), time.perf_counter()
        for number in range(ROUNDS):
            for at, gang in enumerate(launcher.gangs.values()):
                gang.progress(number + 1)
                gang.metrics(number + 1, number + 1)
                ahead_s = begun + number + at / count - time.perf_counter()
                if ahead_s > 0:
                    await asyncio.sleep(ahead_s)
        await enough.wait()
        cpu_s, wall_s = time.process_time() - begun_cpu, time.perf_counter() - begun
    each_ms = cpu_s / (ROUNDS * count) * 1000
    rows = [
        (
            f"A report of progress and metrics, {count:,} gangs at one a second: CPU, the scripted gangs' own included",
            "under 0.6 ms",
            f"{each_ms:.2f} ms ({CPU_BEFORE_MS} ms in the version before, on the same day with 300 gangs)",
        ),
        ("the share of a core that this is", "", f"{cpu_s / wall_s:.0%}"),
    ]
    return rows, each_ms < 0.6


async def followers(folder: Path, count: int) -> tuple[list[Row], bool]:
    """The share of a core that followers of quiet jobs cost, of logs and of metrics, half of them of one job."""
    launcher = PatientLauncher(nodes=(Node("node-1", "127.0.0.1", 1, 0, 1 << 40),))
    calm = Intervals(heartbeat_s=15.0, poll_s=0.5)
    async with (
        running_core(folder, launcher, schedule=False) as core,
        serving_store(core.store, folder, clock=core.clock, launcher=launcher, intervals=calm) as service,
    ):
        made = [await core.submit(new_job(f"job-{at}")) for at in range(count // 2)]
        for job in made:
            logs = folder / "storage" / "jobs" / job.uid / "e000001" / "logs"
            logs.mkdir(parents=True)
            (logs / "rank-0.stdout.log").write_text("")
        names = [f"{PARENT}/jobs/job-{at if at < count // 2 else 0}" for at in range(count)]
        streams = [service.logs.TailLogs(log_service_pb2.TailLogsRequest(name=name, follow=True)) for name in names]
        logs_share = await share_of_core(streams)
        for stream in streams:
            stream.cancel()
        watches = [service.metrics.WatchMetrics(metric_service_pb2.WatchMetricsRequest(name=name)) for name in names]
        metrics_share = await share_of_core(watches)
        for stream in watches:
            stream.cancel()
    rows = [
        (f"{count:,} followers of quiet logs: share of a core", "under 10 %", f"{logs_share:.1%}"),
        (f"{count:,} followers of quiet metrics: share of a core", "under 10 %", f"{metrics_share:.1%}"),
    ]
    return rows, logs_share < 0.1 and metrics_share < 0.1


async def share_of_core(streams: Sequence[grpc.aio.UnaryStreamCall]) -> float:
    """What streams cost that say nothing for five seconds."""
    reads: list[asyncio.Future[Message]] = [asyncio.ensure_future(stream.read()) for stream in streams]
    await asyncio.sleep(3)
    begun_cpu, begun = time.process_time(), time.perf_counter()
    await asyncio.sleep(5)
    share = (time.process_time() - begun_cpu) / (time.perf_counter() - begun)
    for read in reads:
        read.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    return share


def start(folder: Path) -> tuple[float, float]:
    """Seconds until the port of a coordinator on this state answers, and until it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "SHARDYARD_STATE_DIR": str(folder),
        "SHARDYARD_LISTEN": address,
        "SHARDYARD_LAUNCHER": "local",
    }
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardyard_coordinator.main"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            port_s = 0.0
            while True:
                with contextlib.suppress(grpc.RpcError):
                    answer = check(health_pb2.HealthCheckRequest(), timeout=1)
                    port_s = port_s or time.perf_counter() - begun
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return port_s, time.perf_counter() - begun
                if process.poll() is not None:
                    raise RuntimeError("the coordinator did not start")
                time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
