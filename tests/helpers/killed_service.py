"""A service of its own process, killed again and again while many callers submit; and what must hold afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from sqlalchemy import Connection, select

from helpers.ports import free_port
from helpers.repository import ROOT
from helpers.service import PARENT, a_spec
from helpers.stores import of_child, store_at
from shardyard.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.store import open_store

CALLERS = 16
START_S = 300.0
# The call may have been carried out, or not.
MAYBE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass
class Load:
    """What callers were told: request id → the name of its job."""

    told: dict[str, str] = field(default_factory=dict)
    again: int = 0


async def submit_through_kills(folder: Path, kills: int, *, seed: int) -> Load:
    """Each caller repeats its call, with the same request id, until it is answered."""
    rng, load, address = random.Random(seed), Load(), f"127.0.0.1:{free_port()}"
    data = folder / "data" / "corpus.txt"
    data.parent.mkdir()
    data.write_text("some words\n")
    job = a_spec(spec__train_data__uri=str(data))
    for _ in range(kills):
        async with _service(folder, address) as process, _callers(address, job, load):
            before = len(load.told)
            async with asyncio.timeout(START_S):
                while len(load.told) < before + rng.randrange(1, 200):
                    await asyncio.sleep(0.01)
            process.kill()
            await process.wait()
    return load


@contextlib.asynccontextmanager
async def _service(folder: Path, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {**os.environ, **of_child(folder), "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "helpers.serving_run", str(folder), address]
    process = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def _callers(address: str, job: job_pb2.Job, load: Load) -> AsyncIterator[None]:
    async with grpc.aio.insecure_channel(address) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        callers = [asyncio.create_task(_call(jobs, job, load)) for _ in range(CALLERS)]
        try:
            yield
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)


async def _call(jobs: job_service_pb2_grpc.JobServiceStub, job: job_pb2.Job, load: Load) -> None:
    while True:
        request = job_service_pb2.CreateJobRequest(parent=PARENT, job=job, request_id=str(uuid.uuid4()))
        while request.request_id not in load.told:
            try:
                made = await jobs.CreateJob(request, timeout=30)
            except grpc.RpcError as error:
                assert error.code() in MAYBE, error  # type: ignore[attr-defined]
                load.again += 1
                await asyncio.sleep(0.05)
            else:
                load.told[request.request_id] = made.name


async def assert_exactly_once(folder: Path, load: Load) -> int:
    """All that callers were told is there, once, with its first event and its entry in the audit log; how many jobs."""
    store = await open_store(store_at(folder), SystemClock(), NullTrace())
    try:
        jobs, requests, firsts = await store.read(_rows)
        recorded = await store.read(lambda conn: list(conn.execute(select(tables.audit.c.resource)).scalars()))
    finally:
        await store.close()
    assert len(jobs) == len(set(jobs.values())) == len(requests) == len(firsts)
    assert set(firsts) == set(jobs)
    assert sorted(recorded) == sorted(jobs.values())
    for request_id, name in load.told.items():
        assert jobs[requests[request_id]] == name
    return len(jobs)


def _rows(conn: Connection) -> tuple[dict[str, str], dict[str, str], list[str]]:
    job, request, event = tables.job.c, tables.request.c, tables.event.c
    jobs = {row.uid: f"{PARENT}/jobs/{row.job_id}" for row in conn.execute(select(job.uid, job.job_id))}
    requests = {row.request_id: row.job_uid for row in conn.execute(select(request.request_id, request.job_uid))}
    return jobs, requests, list(conn.execute(select(event.job_uid).where(event.sequence == 1)).scalars())
