"""Calls in flight are bounded by kind: using up one kind does not affect the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helpers.service import PARENT, Service, create, refused, serving
from helpers.uploads import send_dataset
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_pb2, log_service_pb2, metric_service_pb2, server_service_pb2
from shardyard.v1 import job_service_pb2 as jobs
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.serve.app import descriptors
from shardyard_coordinator.serve.limits import InFlight, Limits, is_never_shed
from shardyard_coordinator.serve.openings import Openings
from shardyard_coordinator.serve.watch import Intervals

STORY = f"{PARENT}/jobs/story"
STORM = 3_000
BURST = 1_000


@contextlib.asynccontextmanager
async def story(folder: Path, **limits: int) -> AsyncIterator[Service]:
    """A service with a job and a data set."""
    async with serving(folder, limits=Limits(**limits), intervals=Intervals()) as service:
        await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
        request = create("story")
        request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
        await service.jobs.CreateJob(request)
        yield service


async def first(call: Any) -> Any:
    """The first message of a stream, which is then left."""
    found = await asyncio.wait_for(call.read(), 20)
    call.cancel()
    return found


async def rest(call: Any) -> list[int]:
    """The states that a watch still hears of, to its end."""
    found: list[int] = []
    while (batch := await call.read()) is not grpc.aio.EOF:
        found += [event.state.to for event in batch.events if event.HasField("state")]
    return found


async def test_watchers_leave_every_other_kind_of_stream_its_places(tmp_path: Path) -> None:
    async with story(tmp_path, max_watches=2) as service:
        watching = [service.jobs.WatchJob(jobs.WatchJobRequest(name=STORY)) for _ in range(2)]
        for call in watching:
            await call.read()
        failure = await refused(service.jobs.WatchJob(jobs.WatchJobRequest(name=STORY)).read())
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        assert "WatchJob" in failure.message and "max_watches" in failure.message and failure.retry_after_s

        waiting = asyncio.ensure_future(service.jobs.WaitJob(jobs.WaitJobRequest(name=STORY)))
        assert (await send_dataset(service, "more", {"b.txt": b"x"})).state == datasets.Dataset.STATE_READY
        down = datasets.DownloadDatasetRequest(name=f"{PARENT}/datasets/corpus", path="a.txt")
        assert (await first(service.datasets.DownloadDataset(down))).chunk.data == b"hello\n"
        health = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await first(health)).status == health_pb2.HealthCheckResponse.SERVING
        logs = service.logs.TailLogs(log_service_pb2.TailLogsRequest(name=STORY))
        metrics = service.metrics.WatchMetrics(metric_service_pb2.WatchMetricsRequest(name=STORY))
        await service.jobs.CancelJob(jobs.CancelJobRequest(name=STORY))
        assert (await waiting).state == job_pb2.STATE_CANCELLED
        for call in (logs, metrics):
            async for _ in call:
                pass
            assert await call.code() is grpc.StatusCode.OK
        for call in watching:
            call.cancel()


async def test_health_every_get_and_every_cancel_are_served_under_overload(tmp_path: Path) -> None:
    async with story(tmp_path) as quiet:
        made = await quiet.jobs.GetJob(jobs.GetJobRequest(name=STORY))
    async with serving(tmp_path, limits=Limits(max_unary=0)) as service:
        failure = await refused(service.jobs.ListJobs(jobs.ListJobsRequest(parent=PARENT)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert (await service.jobs.GetJob(jobs.GetJobRequest(name=STORY))).uid == made.uid
        assert (await service.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())).version
        found = await health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest())
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        await service.jobs.CancelJob(jobs.CancelJobRequest(name=STORY))


def test_what_is_never_shed_is_found_in_the_descriptors() -> None:
    paths = {f"/{service.full_name}/{method.name}" for service in descriptors() for method in service.methods}
    kept = {path.rpartition("/")[2] for path in paths if is_never_shed(path)}
    assert {"GetJob", "GetModel", "GetDataset", "GetCheckpoint", "GetServerInfo", "CancelJob", "Check"} <= kept
    assert not kept & {"CreateJob", "PlanJob", "Predict", "ListJobs", "WaitJob"}


async def test_streams_that_are_opened_all_at_once_are_all_served(tmp_path: Path) -> None:
    async with story(tmp_path) as service:
        calls = [service.jobs.WatchJob(jobs.WatchJobRequest(name=STORY)) for _ in range(STORM)]
        answers = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        assert failed == []
        # All of them hear of the end, and end with OK.
        await service.jobs.CancelJob(jobs.CancelJobRequest(name=STORY))
        heard = await asyncio.gather(*(rest(call) for call in calls))
        assert {found[-1] for found in heard} == {job_pb2.STATE_CANCELLED}
        assert {await call.code() for call in calls} == {grpc.StatusCode.OK}


async def test_a_call_that_comes_after_many_watches_is_answered_before_the_last_of_them(tmp_path: Path) -> None:
    async with story(tmp_path) as service:
        calls = [service.jobs.WatchJob(jobs.WatchJobRequest(name=STORY)) for _ in range(BURST)]
        answers = [asyncio.ensure_future(call.read()) for call in calls]
        await service.jobs.GetJob(jobs.GetJobRequest(name=STORY))
        answered = sum(answer.done() for answer in answers)
        assert {(await answer).job_uid for answer in answers} != {""}
        for call in calls:
            call.cancel()
    # How many is the machine's business; that they begin a few at a time, and after other calls, is shown below.
    assert answered < BURST


async def test_of_a_burst_of_streams_a_few_begin_before_another_call_and_the_others_after_it_in_order() -> None:
    openings, begun, end = Openings(), list[int](), asyncio.Event()
    begun_before_it: list[int] = []

    async def opened(number: int) -> None:
        async with openings.turn():
            begun.append(number)
            await end.wait()

    async def called() -> None:
        begun_before_it[:] = begun

    streams = [asyncio.create_task(opened(number)) for number in range(100)]
    call = asyncio.create_task(called())
    await call
    assert begun_before_it == list(range(8))
    streams[30].cancel()
    most, seen = 0, 8
    while len(begun) < 99:
        await asyncio.sleep(0)
        most, seen = max(most, len(begun) - seen), len(begun)
    assert begun == [number for number in range(100) if number != 30]
    assert most <= 8
    end.set()
    await asyncio.wait(streams)


async def test_streams_that_are_opened_one_after_the_other_are_not_held_up() -> None:
    openings = Openings()

    async def opened() -> None:
        async with openings.turn():
            pass

    for _ in range(1_000):
        stream = asyncio.create_task(opened())
        await asyncio.sleep(0)
        assert stream.done()


def test_one_principal_of_many_has_a_tenth_of_each_pot_and_the_one_on_loopback_all() -> None:
    path, limits = "/shardyard.v1.JobService/WatchJob", Limits(max_watches=20)
    in_flight = InFlight(limits)
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(in_flight.stream(path, "alice"))
        with pytest.raises(Refused):
            held.enter_context(in_flight.stream(path, "alice"))
        for _ in range(18):
            held.enter_context(in_flight.stream(path, "local"))
        with pytest.raises(Refused):
            held.enter_context(in_flight.stream(path, "local"))
    with in_flight.stream(path, "alice"):
        assert Limits().max_watches == 10_000
