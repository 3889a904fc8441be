"""WatchJob: gapless, in order, through cuts, drains and slow readers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2

from helpers.service import PARENT, Service, create, failure_of, refused, serving
from helpers.uploads import send_dataset
from shardyard.v1 import job_pb2, job_service_pb2_grpc
from shardyard.v1 import job_service_pb2 as pb
from shardyard_coordinator.domain.records import EventKind, EventRecord
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.watch import Intervals
from shardyard_coordinator.store import encode, events, jobs

NAME = f"{PARENT}/jobs/story"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        await submit(running)
        yield running


async def submit(service: Service) -> job_pb2.Job:
    request = create("story")
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    await send_dataset(service, "corpus", {"a.txt": b"to be or not to be\n"})
    return await service.jobs.CreateJob(request)


async def emit(service: Service, count: int, first: int = 1) -> None:
    """Records progress events, some commits of one and some of several."""
    uid = (await service.jobs.GetJob(pb.GetJobRequest(name=NAME))).uid
    drafts = [
        encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=step)), 1)
        for step in range(first, first + count)
    ]
    while drafts:
        size = min(len(drafts), 7)
        part, drafts = drafts[:size], drafts[size:]
        await service.store.write(
            lambda conn, part=part: events.append(conn, uid, part, service.clock.now_us()), SYSTEM
        )


async def finish(service: Service) -> None:
    await service.jobs.CancelJob(pb.CancelJobRequest(name=NAME))


async def log_of(service: Service) -> list[EventRecord]:
    uid = (await service.jobs.GetJob(pb.GetJobRequest(name=NAME))).uid
    return await service.store.read(lambda conn: events.events_after(conn, uid, 0, 10_000))


async def watched(service: Service, **fields: object) -> list[pb.WatchJobResponse]:
    return [batch async for batch in service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, **fields))]


async def test_a_watcher_gets_the_whole_log_and_ok_after_the_terminal_event(service: Service) -> None:
    watching = asyncio.create_task(watched(service))
    await emit(service, 50)
    await finish(service)
    batches = await watching
    sequences = [event.sequence for batch in batches for event in batch.events]
    assert sequences == list(range(1, 53))
    cursor = 0
    for batch in batches:
        assert batch.after_sequence == cursor
        cursor = batch.last_sequence
    last = batches[-1].events[-1]
    assert last.state.to == job_pb2.STATE_CANCELLED
    assert await watched(service) != []


async def test_a_watcher_that_is_cut_a_hundred_times_has_exactly_the_log(service: Service) -> None:
    rng = random.Random(7)
    seen: list[job_pb2.JobEvent] = []
    cuts = 0

    async def follow() -> None:
        nonlocal cuts
        while True:
            call = service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, after_sequence=len(seen)))
            keep = rng.randint(1, 3) if cuts < 100 else 10_000
            try:
                async for batch in call:
                    assert batch.after_sequence == len(seen)
                    seen.extend(batch.events)
                    keep -= 1
                    if keep == 0:
                        call.cancel()
                        cuts += 1
                        break
                else:
                    return
            except asyncio.CancelledError:
                raise

    following = asyncio.create_task(follow())
    step = 1
    while cuts < 100:
        await emit(service, 3, step)
        step += 3
        await asyncio.sleep(0.002)
    await finish(service)
    await asyncio.wait_for(following, 30)
    log = await log_of(service)
    assert [event.sequence for event in seen] == [record.sequence for record in log]
    assert [event.SerializeToString() for event in seen] == [
        encode.event_to_proto(record).SerializeToString() for record in log
    ]
    assert cuts >= 100


async def test_a_filter_by_kind_is_never_a_gap(service: Service) -> None:
    await emit(service, 10)
    await finish(service)
    batches = await watched(service, kinds=[pb.EVENT_KIND_STATE])
    assert [event.WhichOneof("payload") for batch in batches for event in batch.events] == ["state", "state"]
    assert (batches[0].after_sequence, batches[-1].last_sequence) == (0, 12)


async def test_a_snapshot_comes_first_and_fits_the_cursor(service: Service) -> None:
    await finish(service)
    first, *rest = await watched(service, include_snapshot=True, after_sequence=2)
    assert first.snapshot.state == job_pb2.STATE_CANCELLED and first.snapshot.last_event_sequence == 2
    assert (first.after_sequence, first.last_sequence, list(first.events)) == (2, 2, [])
    assert rest == [] and first.job_uid == first.snapshot.uid


async def test_heartbeats_show_the_position_of_a_silent_job(service: Service) -> None:
    call = service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, after_sequence=1))
    batches = [await call.read() for _ in range(3)]
    assert [(batch.after_sequence, batch.last_sequence, len(batch.events)) for batch in batches] == [(1, 1, 0)] * 3
    call.cancel()


@pytest.mark.parametrize(("asked_s", "kept_s"), [(0, 0.001), (36_000, 0.05), (0.02, 0.02)])
async def test_the_interval_is_clamped_and_echoed(service: Service, asked_s: float, kept_s: float) -> None:
    interval = duration_pb2.Duration()
    interval.FromMicroseconds(round(asked_s * 1e6))
    call = service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, min_interval=interval))
    batch = await call.read()
    assert batch.min_interval.ToMicroseconds() / 1e6 == pytest.approx(kept_s, rel=0.3)
    call.cancel()


async def test_cursors_that_do_not_fit_are_refused(service: Service) -> None:
    ahead = await refused(service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, after_sequence=99)).read())
    assert (ahead.code, ahead.reason, ahead.metadata["last"]) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_AHEAD", "1")
    replaced = await refused(service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, job_uid="0" * 32)).read())
    assert (replaced.code, replaced.reason) == (grpc.StatusCode.ABORTED, "JOB_REPLACED")


async def test_an_expired_cursor_is_refused_with_the_oldest_sequence(service: Service) -> None:
    await emit(service, 10)
    await finish(service)
    service.clock.advance(1000)
    [expired] = await service.store.read(lambda conn: events.expired_events(conn, service.clock.now_us()))
    await service.store.write(lambda conn: events.remove_events(conn, [(expired.job_uid, expired.last)]), SYSTEM)
    gone = await refused(service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, after_sequence=3)).read())
    assert (gone.code, gone.reason) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_EXPIRED")
    oldest = int(gone.metadata["oldest_sequence"])
    batches = await watched(service, after_sequence=oldest - 1)
    assert batches[-1].events[-1].state.to == job_pb2.STATE_CANCELLED


async def test_the_events_of_a_purged_job_are_not_passed_over_in_silence(service: Service) -> None:
    await emit(service, 3)
    await finish(service)
    uid = (await service.jobs.GetJob(pb.GetJobRequest(name=NAME))).uid
    await service.jobs.DeleteJob(pb.DeleteJobRequest(name=NAME))
    await service.store.write(lambda conn: jobs.purge_events(conn, uid), SYSTEM)
    call = service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, job_uid=uid, after_sequence=2))
    assert (await refused(call.read())).reason == "CURSOR_EXPIRED"


async def test_the_ring_and_the_store_give_the_same_events(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        await submit(service)
        service.app._fanout._ring_size = 5
        watching = asyncio.create_task(watched(service))
        await emit(service, 300)
        await finish(service)
        sequences = [event.sequence for batch in await watching for event in batch.events]
        assert sequences == list(range(1, 303))


async def test_what_left_the_ring_while_a_watcher_was_busy_is_not_missed(tmp_path: Path) -> None:
    async with serving(tmp_path, intervals=Intervals(heartbeat_s=0.1, most_s=1.0)) as service:
        await submit(service)
        other = create("other")
        other.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
        service.app._fanout._ring_size = 5
        call = service.jobs.WatchJob(pb.WatchJobRequest(name=NAME, min_interval=duration_pb2.Duration(seconds=1)))
        sequences = [event.sequence for event in (await call.read()).events]
        await emit(service, 3)
        await finish(service)
        uid = (await service.jobs.CreateJob(other)).uid
        draft = encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=1)), 1)
        await service.store.write(lambda conn: events.append(conn, uid, [draft] * 10, 1), SYSTEM)
        async with asyncio.timeout(5):
            while (batch := await call.read()) is not grpc.aio.EOF:
                sequences += [event.sequence for event in batch.events]
        assert sequences == [1, 2, 3, 4, 5]


async def test_a_drain_ends_streams_with_draining_and_shows_in_health(service: Service) -> None:
    call = service.jobs.WatchJob(pb.WatchJobRequest(name=NAME))
    await call.read()
    stopping = asyncio.create_task(service.app.stop(1))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        while await call.read() is not grpc.aio.EOF:
            pass
    failure = failure_of(raised.value)
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await stopping


async def test_too_many_watchers_are_refused_with_a_delay(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_watches=2)) as service:
        await submit(service)
        calls = [service.jobs.WatchJob(pb.WatchJobRequest(name=NAME)) for _ in range(2)]
        for call in calls:
            await call.read()
        failure = await refused(service.jobs.WatchJob(pb.WatchJobRequest(name=NAME)).read())
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        assert failure.retry_after_s is not None and failure.retry_after_s > 0
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("reads_first", [True, False])
async def test_a_reader_that_stopped_reading_ends_as_a_slow_consumer(tmp_path: Path, *, reads_first: bool) -> None:
    async with (
        serving(tmp_path, limits=Limits(slow_consumer_s=0.3)) as service,
        # A window that does not grow: else the transport takes megabytes for a reader that takes nothing.
        grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=[("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        await submit(service)
        uid = (await service.jobs.GetJob(pb.GetJobRequest(name=NAME))).uid
        big = encode.draft(EventKind.WARNING, job_pb2.JobEvent(warning=job_pb2.Warning(message="x" * 100_000)))
        if not reads_first:
            await service.store.write(lambda conn: events.append(conn, uid, [big] * 10, 1), SYSTEM)
        call = job_service_pb2_grpc.JobServiceStub(channel).WatchJob(pb.WatchJobRequest(name=NAME), timeout=20)
        if reads_first:
            await call.read()
        for _ in range(10):
            await service.store.write(lambda conn: events.append(conn, uid, [big] * 10, 1), SYSTEM)
        await asyncio.sleep(1.0)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            while await call.read() is not grpc.aio.EOF:
                pass
        failure = failure_of(raised.value)
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")


async def test_a_deleted_job_is_watched_to_its_end_by_who_knows_its_uid(service: Service) -> None:
    uid = (await service.jobs.GetJob(pb.GetJobRequest(name=NAME))).uid
    await finish(service)
    await service.jobs.DeleteJob(pb.DeleteJobRequest(name=NAME))
    batches = await watched(service, job_uid=uid)
    assert batches[-1].events[-1].WhichOneof("payload") == "deleted"
    gone = await refused(service.jobs.WatchJob(pb.WatchJobRequest(name=NAME)).read())
    assert gone.reason == "JOB_NOT_FOUND"


async def test_waiting_ends_when_the_job_does(service: Service) -> None:
    waiting = asyncio.ensure_future(service.jobs.WaitJob(pb.WaitJobRequest(name=NAME)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await finish(service)
    assert (await asyncio.wait_for(waiting, 5)).state == job_pb2.STATE_CANCELLED
    short = pb.WaitJobRequest(name=NAME)
    short.timeout.FromMilliseconds(1)
    assert (await service.jobs.WaitJob(short)).state == job_pb2.STATE_CANCELLED


def test_a_job_is_terminal_exactly_in_the_states_of_the_table() -> None:
    assert {state for state in jobs.JobState if state.is_terminal} == {"SUCCEEDED", "FAILED", "CANCELLED"}
