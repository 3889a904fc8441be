"""LogService and MetricService: files and points after a cursor, until the job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import event

from helpers.service import PARENT, Service, create, refused, serving
from helpers.uploads import send_dataset
from shardyard.v1 import job_pb2
from shardyard.v1 import job_service_pb2 as jobs_pb
from shardyard.v1 import log_service_pb2 as logs_pb
from shardyard.v1 import metric_service_pb2 as metrics_pb
from shardyard_coordinator.domain.records import MetricPoint
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve import logfiles
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store import metrics

NAME = f"{PARENT}/jobs/story"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        await send_dataset(running, "corpus", {"a.txt": b"hello\n"})
        request = create("story")
        request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
        request.job.spec.resources.workers = 2
        await running.jobs.CreateJob(request)
        yield running


async def log_file(service: Service, name: str, attempt: int = 1) -> Path:
    uid = (await service.jobs.GetJob(jobs_pb.GetJobRequest(name=NAME))).uid
    folder = service.parts.storage / "jobs" / uid / f"e{attempt:06}" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


async def cancel(service: Service) -> None:
    await service.jobs.CancelJob(jobs_pb.CancelJobRequest(name=NAME))


async def tail(service: Service, **fields: object) -> list[logs_pb.TailLogsResponse]:
    request = logs_pb.TailLogsRequest(name=NAME, **fields)  # type: ignore[arg-type]
    return [batch async for batch in service.logs.TailLogs(request)]


def texts(batches: list[logs_pb.TailLogsResponse]) -> list[str]:
    return [line.text for batch in batches for line in batch.lines]


async def test_lines_have_rank_stream_level_and_time(service: Service) -> None:
    (await log_file(service, "rank-0.stdout.log")).write_text("plain\n2026-01-31 12:00:00,250 ERROR it broke\n")
    (await log_file(service, "rank-1.stderr.log")).write_text("2026-01-31T12:00:00Z DEBUG small\nTraceback\n")
    (await log_file(service, "notes.txt")).write_text("not a log\n")
    lines = [line for batch in await tail(service) for line in batch.lines]
    assert [(line.rank, line.stream, line.level) for line in lines] == [
        (0, logs_pb.LOG_STREAM_STDOUT, logs_pb.LOG_LEVEL_INFO),
        (0, logs_pb.LOG_STREAM_STDOUT, logs_pb.LOG_LEVEL_ERROR),
        (1, logs_pb.LOG_STREAM_STDERR, logs_pb.LOG_LEVEL_DEBUG),
        (1, logs_pb.LOG_STREAM_STDERR, logs_pb.LOG_LEVEL_WARNING),
    ]
    assert lines[1].time.ToJsonString() == "2026-01-31T12:00:00.250Z" and lines[1].attempt == 1
    assert texts(await tail(service, min_level=logs_pb.LOG_LEVEL_ERROR)) == ["2026-01-31 12:00:00,250 ERROR it broke"]
    assert texts(await tail(service, rank=1)) == ["2026-01-31T12:00:00Z DEBUG small", "Traceback"]


async def test_a_cursor_continues_after_its_batch(service: Service) -> None:
    file = await log_file(service, "rank-0.stdout.log")
    file.write_text("".join(f"line {at}\n" for at in range(2500)))
    batches = await tail(service)
    assert len(batches) == 3 and texts(batches) == [f"line {at}" for at in range(2500)]
    assert texts(await tail(service, cursor=batches[0].cursor)) == [f"line {at}" for at in range(1000, 2500)]
    with file.open("a") as more:
        more.write("later\n")
    assert texts(await tail(service, cursor=batches[-1].cursor)) == ["later"]


async def test_the_last_lines_of_each_rank(service: Service) -> None:
    for rank in (0, 1):
        (await log_file(service, f"rank-{rank}.stdout.log")).write_text(
            "".join(f"{rank}:{at}\n" for at in range(50_000))
        )
    assert texts(await tail(service, tail_lines=2)) == ["0:49998", "0:49999", "1:49998", "1:49999"]


async def test_following_ends_with_the_job_and_misses_nothing(service: Service) -> None:
    file = await log_file(service, "rank-0.stdout.log")
    file.write_text("first\nhal")
    following = asyncio.create_task(tail(service, follow=True))
    await asyncio.sleep(0.05)
    with file.open("a") as more:
        more.write("f\nlast without a break")
    await asyncio.sleep(0.05)
    assert not following.done()
    await cancel(service)
    assert texts(await asyncio.wait_for(following, 5)) == ["first", "half", "last without a break"]


async def test_long_and_undecodable_lines_are_cut_and_shown(service: Service) -> None:
    (await log_file(service, "rank-0.stdout.log")).write_bytes(b"x" * 300_000 + b"\n\xff\xfe\n\nend\n")
    found = texts(await tail(service))
    assert all(len(text) <= 16 * 1024 for text in found)
    assert found[-3:] == ["��", "", "end"]


async def test_a_serious_line_is_found_behind_many_that_are_not(service: Service) -> None:
    file = await log_file(service, "rank-0.stdout.log")
    file.write_text(("2026-01-31 12:00:00 DEBUG " + "x" * 8000 + "\n") * 2200 + "2026-01-31 12:00:00 ERROR it broke\n")
    assert file.stat().st_size > logfiles.MAX_READ_BYTES
    assert texts(await tail(service, min_level=logs_pb.LOG_LEVEL_ERROR)) == ["2026-01-31 12:00:00 ERROR it broke"]


async def test_a_gang_of_many_ranks_has_a_cursor_that_continues(service: Service) -> None:
    for rank in range(1500):
        (await log_file(service, f"rank-{rank}.stdout.log")).write_text("x\n")
    batches = await tail(service)
    assert len(texts(batches)) == 1500 and len(batches[-1].cursor) > 20_000
    assert texts(await tail(service, cursor=batches[-1].cursor)) == []


async def test_a_log_cursor_of_another_job_is_refused(service: Service) -> None:
    (await log_file(service, "rank-0.stdout.log")).write_text("x\n")
    cursor = (await tail(service))[-1].cursor
    await cancel(service)
    await service.jobs.DeleteJob(jobs_pb.DeleteJobRequest(name=NAME))
    request = create("story")
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    await service.jobs.CreateJob(request)
    failure = await refused(service.logs.TailLogs(logs_pb.TailLogsRequest(name=NAME, cursor=cursor)).read())
    assert failure.reason == "CURSOR_INVALID"


async def add_points(service: Service, first: int, last: int, attempt: int = 1, name: str = "loss") -> None:
    uid = (await service.jobs.GetJob(jobs_pb.GetJobRequest(name=NAME))).uid
    points = [MetricPoint(attempt, step, step * 1_000_000, 1 / step) for step in range(first, last + 1)]
    await service.store.write(lambda conn: metrics.add_points(conn, uid, name, points), SYSTEM)


async def watch(service: Service, **fields: object) -> list[metrics_pb.WatchMetricsResponse]:
    request = metrics_pb.WatchMetricsRequest(name=NAME, **fields)  # type: ignore[arg-type]
    return [batch async for batch in service.metrics.WatchMetrics(request) if batch.series]


def steps(batches: list[metrics_pb.WatchMetricsResponse], name: str = "loss") -> list[int]:
    return [
        point.step for batch in batches for series in batch.series if series.metric == name for point in series.points
    ]


async def test_metrics_are_followed_to_the_end_of_the_job(service: Service) -> None:
    watching = asyncio.create_task(watch(service))
    await add_points(service, 1, 10)
    await asyncio.sleep(0.03)
    await add_points(service, 11, 20)
    await add_points(service, 1, 3, name="eval/loss")
    await asyncio.sleep(0.03)
    await cancel(service)
    batches = await asyncio.wait_for(watching, 5)
    assert steps(batches) == list(range(1, 21)) and steps(batches, "eval/loss") == [1, 2, 3]
    again = await watch(service, cursor=batches[0].cursor)
    assert steps(batches[:1]) + steps(again) == list(range(1, 21))
    assert steps(await watch(service, metrics=["eval/loss"]), "eval/loss") == [1, 2, 3]


async def test_history_is_downsampled_to_the_reported_limit(service: Service) -> None:
    await add_points(service, 1, 5000)
    answer = await service.metrics.QueryMetrics(metrics_pb.QueryMetricsRequest(name=NAME, max_points=100))
    (series,) = answer.series
    assert answer.max_points == 100 and len(series.points) <= 100 and series.total_points == 5000
    values = [point.value for point in series.points]
    assert max(values) == 1.0 and series.points[-1].step == 5000
    huge = await service.metrics.QueryMetrics(metrics_pb.QueryMetricsRequest(name=NAME, max_points=10**9))
    assert huge.max_points == 100_000 and len(huge.series[0].points) == 5000
    part = await service.metrics.QueryMetrics(metrics_pb.QueryMetricsRequest(name=NAME, min_step=10, max_step=12))
    assert [point.step for point in part.series[0].points] == [10, 11, 12]


async def test_a_waiting_job_has_no_attempts_and_no_checkpoints(service: Service) -> None:
    found = await service.jobs.ListAttempts(jobs_pb.ListAttemptsRequest(parent=NAME))
    assert list(found.attempts) == []
    job = await service.jobs.GetJob(jobs_pb.GetJobRequest(name=NAME))
    assert job.state == job_pb2.STATE_QUEUED and job.attempt_count == 0


SELDOM = Intervals(heartbeat_s=60.0, least_s=0.001, most_s=0.05, poll_s=0.01)


async def test_quiet_followers_ask_the_store_nothing_and_are_woken_by_what_comes(tmp_path: Path) -> None:
    reads: list[object] = []
    async with serving(tmp_path, intervals=SELDOM) as service:
        await send_dataset(service, "corpus", {"a.txt": b"hello\n"})
        request = create("story")
        request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
        await service.jobs.CreateJob(request)
        uid = (await service.jobs.GetJob(jobs_pb.GetJobRequest(name=NAME))).uid
        logs = [service.logs.TailLogs(logs_pb.TailLogsRequest(name=NAME, follow=True)) for _ in range(10)]
        curves = [service.metrics.WatchMetrics(metrics_pb.WatchMetricsRequest(name=NAME)) for _ in range(10)]
        lines = [asyncio.ensure_future(each.read()) for each in logs]
        points = [asyncio.ensure_future(each.read()) for each in curves]
        await asyncio.sleep(0.3)
        event.listen(service.store._reading, "begin", reads.append)
        await asyncio.sleep(0.3)  # 20 followers that looked every 10 ms would have looked 600 times.
        quiet = len(reads)
        (await log_file(service, "rank-0.stdout.log")).write_text("one\n")
        assert {(await each).lines[0].text for each in lines} == {"one"}
        with (await log_file(service, "rank-0.stdout.log")).open("a") as more:
            more.write("two\n")
        assert {(await each.read()).lines[0].text for each in logs} == {"two"}
        fresh = [MetricPoint(1, 1, 0, 0.5)]
        await service.store.write(lambda conn: metrics.add_points(conn, uid, "loss", fresh), SYSTEM)
        assert {(await each).series[0].points[0].value for each in points} == {0.5}
        for each in (*logs, *curves):
            each.cancel()
    assert quiet == 0 < len(reads)
