"""The port before the store is open: who asks hears that the service starts, who can wait is answered by it."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helpers.clock import ManualClock
from helpers.core import ACTOR, new_job
from helpers.processes import MAIN, environment, running
from helpers.served import free_port
from helpers.service import PARENT, refused, serving_store
from shardyard.v1 import job_service_pb2, job_service_pb2_grpc
from shardyard_coordinator.control.storage_claim import claim_storage
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.app import make_door
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.store import submissions
from shardyard_coordinator.store.store import lock_store, open_store

CHECK = health_pb2.HealthCheckRequest()
LIST = job_service_pb2.ListJobsRequest(parent=PARENT)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_calls_that_come_before_the_store_is_open_wait_for_it_or_hear_that_the_service_starts(
    tmp_path: Path,
) -> None:
    door = make_door(Limits(), Access(Authentication(), ManualClock()))
    port = await door.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health, jobs = health_pb2_grpc.HealthStub(channel), job_service_pb2_grpc.JobServiceStub(channel)
        assert (await health.Check(CHECK)).status == NOT_SERVING
        failure = await refused(jobs.ListJobs(LIST, timeout=0.6))
        assert (failure.code, failure.reason, failure.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "STARTING", 1)
        watched = jobs.WatchJob(job_service_pb2.WatchJobRequest(name=f"{PARENT}/jobs/job"))
        early = asyncio.ensure_future(jobs.ListJobs(LIST))
        store = await open_store(tmp_path / "store.db", ManualClock(), NullTrace())
        await claim_storage(tmp_path / "storage", store)
        await store.write(lambda conn: submissions.create_job(conn, new_job(), ACTOR, 1), ACTOR)
        async with serving_store(store, tmp_path, clock=ManualClock(), door=(door, port)) as service:
            assert [job.name for job in (await early).jobs] == [f"{PARENT}/jobs/job"]
            assert [event.sequence for event in (await watched.read()).events] == [1]
            assert (await health.Check(CHECK)).status == SERVING
            assert len((await service.jobs.ListJobs(LIST)).jobs) == 1
        await store.close()


async def test_a_start_that_comes_to_nothing_lets_go_of_port_and_lock(tmp_path: Path) -> None:
    clock = ManualClock()
    (tmp_path / "store.db").write_bytes(b"SQLite format 3\0 is not what this is" * 300)
    door = make_door(Limits(), Access(Authentication(), ManualClock()))
    port = await door.start("127.0.0.1:0")
    lock = lock_store(tmp_path / "store.db", clock)
    with pytest.raises(Exception, match=r"store\.db"):
        await open_store(tmp_path / "store.db", clock, NullTrace(), lock=lock)
    await door.close()
    lock_store(tmp_path / "store.db", clock).release()
    again = make_door(Limits(), Access(Authentication(), ManualClock()))
    assert await again.start(f"127.0.0.1:{port}") == port
    await again.close()


def test_a_coordinator_answers_while_its_store_is_still_held_by_another_process(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with running(tmp_path):
        pass
    [database] = tmp_path.glob("*.db")
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    process = subprocess.Popen(MAIN, env=environment(tmp_path, SHARDYARD_LISTEN=address), stdout=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            assert health_pb2_grpc.HealthStub(channel).Check(CHECK, timeout=10).status == NOT_SERVING
            holder.execute("ROLLBACK")
            jobs = job_service_pb2_grpc.JobServiceStub(channel)
            assert not jobs.ListJobs(LIST, timeout=30).jobs
    finally:
        holder.close()
        process.kill()
        process.wait()
