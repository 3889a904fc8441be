"""What the transport answers by itself, and calls whose callers do not wait: the service lives on."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest

from helpers.service import PARENT, Service, create, serving
from helpers.uploads import send_dataset
from shardyard.v1 import job_service_pb2 as jobs


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        await send_dataset(running, "corpus", {"a.txt": b"hello\n"})
        yield running
        assert not (await running.jobs.ListJobs(jobs.ListJobsRequest(parent="projects/other"))).jobs


def submission(job_id: str) -> jobs.CreateJobRequest:
    request = create(job_id, request_id=str(uuid.uuid4()))
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    return request


async def code_of(call: object) -> grpc.StatusCode:
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_large_metadata_is_refused_by_the_transport(service: Service) -> None:
    request = jobs.ListJobsRequest(parent=PARENT)
    large = service.jobs.ListJobs(request, metadata=(("x-large", "x" * 20_000),))
    assert await code_of(large) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_compressed_bomb_does_not_grow_the_process(service: Service) -> None:
    before = psutil.Process().memory_info().rss
    bomb = jobs.ListJobsRequest(parent="x" * 40 * 1024 * 1024)
    call = service.jobs.ListJobs(bomb, compression=grpc.Compression.Gzip)
    assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED
    del bomb
    assert psutil.Process().memory_info().rss - before < 160 * 1024 * 1024


async def test_another_protocol_is_hung_up_on(service: Service) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await writer.drain()
    answered = await asyncio.wait_for(reader.read(), 10)
    assert b"200" not in answered and reader.at_eof()
    writer.close()


async def test_a_deadline_that_hits_the_commit_leaves_one_job_or_none(service: Service) -> None:
    rng = random.Random(3)
    await service.jobs.CreateJob(submission("warm"))
    for at in range(20):
        request = submission(f"j{at}")
        first = await code_of(service.jobs.CreateJob(request, timeout=rng.uniform(0.0005, 0.01)))
        assert first in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
        again = await asyncio.gather(*(service.jobs.CreateJob(request) for _ in range(2)))
        assert len({job.uid for job in again}) == 1
    listed = await service.jobs.ListJobs(jobs.ListJobsRequest(parent=PARENT))
    assert len(listed.jobs) == 21


async def test_callers_that_leave_affect_no_other_caller(service: Service) -> None:
    for at in range(20):
        call = service.jobs.CreateJob(submission(f"left{at}"))
        await asyncio.sleep(0.001)
        call.cancel()
        watching = service.jobs.WatchJob(jobs.WatchJobRequest(name=f"{PARENT}/jobs/left{at}"))
        await asyncio.sleep(0)
        watching.cancel()
    made = await service.jobs.CreateJob(submission("stayed"))
    assert (await service.jobs.GetJob(jobs.GetJobRequest(name=made.name))).uid == made.uid
