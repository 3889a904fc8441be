"""JobService over a real server and store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from helpers.service import PARENT, Service, a_spec, create, refused, serving
from shardyard.v1 import job_pb2
from shardyard.v1 import job_service_pb2 as pb


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    data = tmp_path / "data"
    data.mkdir()
    (data / "corpus.txt").write_text("to be or not to be\n" * 10)
    async with serving(tmp_path, data_roots=(str(data),)) as running:
        yield running


def a_job(service: Service, **changes: object) -> job_pb2.Job:
    return a_spec(**{"spec__train_data__uri": service.parts.data_roots[0] + "/corpus.txt", **changes})


async def test_a_job_is_accepted_and_read_back(service: Service) -> None:
    made = await service.jobs.CreateJob(create("first", a_job(service, display_name="mine")))
    assert made.name == f"{PARENT}/jobs/first" and made.state == job_pb2.STATE_QUEUED
    assert made.display_name == "mine" and made.last_event_sequence == 1 and len(made.uid) == 32
    assert made.resolved_spec.resources.workers == 1
    assert await service.jobs.GetJob(pb.GetJobRequest(name=made.name)) == made


async def test_an_id_is_made_from_the_task(service: Service) -> None:
    made = await service.jobs.CreateJob(create(job=a_job(service)))
    assert made.name.startswith(f"{PARENT}/jobs/causal-lm-")


async def test_a_hundred_calls_with_one_request_id_make_one_job(service: Service) -> None:
    request = create(job=a_job(service), request_id=str(uuid.uuid4()))
    made = await asyncio.gather(*(service.jobs.CreateJob(request) for _ in range(100)))
    assert len({job.uid for job in made}) == 1
    listed = await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT))
    assert len(listed.jobs) == 1
    other = create(job=a_job(service, display_name="another"), request_id=request.request_id)
    failure = await refused(service.jobs.CreateJob(other))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
