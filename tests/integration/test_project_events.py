"""EventService: every job of a project on one cursor, gapless, through cuts, other projects and removals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from helpers.service import PARENT, Service, create, failure_of, refused, serving
from helpers.uploads import send_dataset
from shardyard.v1 import event_service_pb2 as pb
from shardyard.v1 import job_pb2, job_service_pb2
from shardyard_coordinator.domain.records import EventKind, Place
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.project_log import Cursors
from shardyard_coordinator.store import encode, events, jobs, project_log

ON_BOTH_STORES = True
OTHER = "projects/other"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        await send_dataset(running, "corpus", {"a.txt": b"to be or not to be\n"})
        yield running


async def submit(service: Service, job_id: str, parent: str = PARENT) -> job_pb2.Job:
    request = create(job_id)
    request.parent = parent
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    return await service.jobs.CreateJob(request)


async def emit(service: Service, job: job_pb2.Job, count: int) -> None:
    """One commit of progress events."""
    drafts = [
        encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=step)), 1)
        for step in range(count)
    ]
    await service.store.write(lambda conn: events.append(conn, job.uid, drafts, service.clock.now_us()), SYSTEM)


async def follow(service: Service, until: int, **fields: Any) -> list[pb.WatchEventsResponse]:
    """Batches until so many events have come."""
    batches, count = [], 0
    call = service.events.WatchEvents(pb.WatchEventsRequest(parent=PARENT, **fields))
    async for batch in call:
        batches.append(batch)
        count += len(batch.events)
        if count >= until:
            break
    call.cancel()
    return batches


def ids(batches: list[Any]) -> list[str]:
    return [each.event.id for batch in batches for each in batch.events]


async def whole_log(service: Service) -> list[str]:
    """The ids of the project's events, read page by page."""
    found: list[str] = []
    token = ""
    while True:
        page = await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, page_size=7, page_token=token))
        found += ids([page])
        token = page.next_page_token
        if not token:
            return found


async def test_a_watcher_gets_every_event_of_every_job_of_its_project_and_no_other(service: Service) -> None:
    watching = asyncio.create_task(follow(service, 63))
    first, other = await submit(service, "first"), await submit(service, "other", OTHER)
    second = await submit(service, "second")
    for _ in range(10):
        await emit(service, first, 3)
        await emit(service, other, 5)
        await emit(service, second, 3)
    await service.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=first.name))
    batches = await asyncio.wait_for(watching, 30)
    cursor = batches[0].after_cursor
    for batch in batches:
        assert batch.after_cursor == cursor
        cursor = batch.cursor
    found = [each for batch in batches for each in batch.events]
    assert {(each.job, each.job_uid) for each in found} == {(first.name, first.uid), (second.name, second.uid)}
    for job in (first, second):
        sequences = [each.event.sequence for each in found if each.job == job.name]
        assert sequences == list(range(1, len(sequences) + 1))
    assert [each.event.id for each in found] == await whole_log(service)


async def test_every_event_has_the_cursor_that_continues_after_it(service: Service) -> None:
    job = await submit(service, "story")
    await emit(service, job, 5)
    [*_, last] = batches = await follow(service, 6)
    events_ = [each for batch in batches for each in batch.events]
    for at, each in enumerate(events_[:-1]):
        assert ids(await follow(service, 1, after_cursor=each.cursor))[0] == events_[at + 1].event.id
    page = await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, page_size=3))
    assert ids(await follow(service, 1, after_cursor=page.cursor))[0] == events_[3].event.id
    later = asyncio.create_task(follow(service, 1, after_cursor=last.cursor))
    await emit(service, job, 1)
    assert ids(await later) == [f"{job.uid}-7"]


async def test_kinds_from_now_and_newest_first(service: Service) -> None:
    job = await submit(service, "story")
    await emit(service, job, 4)
    request = pb.ListEventsRequest(parent=PARENT, kinds=[job_service_pb2.EVENT_KIND_STATE])
    assert [each.event.WhichOneof("payload") for each in (await service.events.ListEvents(request)).events] == ["state"]
    newest = await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, page_size=2, order_by="time desc"))
    assert [each.event.sequence for each in newest.events] == [5, 4]
    token = newest.next_page_token
    rest = pb.ListEventsRequest(parent=PARENT, page_size=2, order_by="time desc", page_token=token)
    assert [each.event.sequence for each in (await service.events.ListEvents(rest)).events] == [3, 2]
    call = service.events.WatchEvents(pb.WatchEventsRequest(parent=PARENT, from_now=True))
    hello = await call.read()
    assert hello.cursor and not hello.events and hello.HasField("min_interval")
    await emit(service, job, 1)
    batch = hello
    while not batch.events:
        batch = await call.read()
    assert [each.event.sequence for each in batch.events] == [6]
    call.cancel()


async def test_a_quiet_project_gets_heartbeats_and_its_cursor_moves_past_the_others(service: Service) -> None:
    job = await submit(service, "loud", OTHER)
    call = service.events.WatchEvents(pb.WatchEventsRequest(parent=PARENT))
    first = await call.read()
    await emit(service, job, 50)
    later = first
    while later.cursor == first.cursor:
        before, later = later, await call.read()
        assert not later.events and later.after_cursor == before.cursor
    call.cancel()


async def test_a_slow_reader_of_a_long_log_gets_all_of_it_from_the_store(service: Service) -> None:
    job = await submit(service, "long")
    for _ in range(6):
        await emit(service, job, 500)
    batches = await asyncio.wait_for(follow(service, 3001), 30)
    assert len(ids(batches)) == len(set(ids(batches))) == 3001
    assert max(len(batch.events) for batch in batches) <= 1000


async def test_a_cursor_before_removed_events_is_expired_and_says_where_to_continue(service: Service) -> None:
    gone, kept = await submit(service, "gone"), await submit(service, "kept")
    [old] = (await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, page_size=1))).events
    await emit(service, gone, 5)
    await service.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=gone.name))
    all_of_it = await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, page_size=100))
    await service.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name=gone.name))
    await service.store.write(lambda conn: jobs.purge_events(conn, gone.uid), SYSTEM)

    call = service.events.WatchEvents(pb.WatchEventsRequest(parent=PARENT, after_cursor=old.cursor))
    with pytest.raises(grpc.RpcError) as error:
        await call.read()
    failure = failure_of(error.value)
    assert (failure.code.name, failure.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
    rest = pb.ListEventsRequest(parent=PARENT, after_cursor=failure.metadata["cursor"])
    assert ids([await service.events.ListEvents(rest)]) == [f"{kept.uid}-1"]
    expired = await refused(service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, after_cursor=old.cursor)))
    assert expired.reason == "CURSOR_EXPIRED" and "after_cursor" in expired.violations
    # Who had read what is gone since, or begins now, misses nothing.
    [first] = (await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT))).events
    for cursor in (first.cursor, all_of_it.cursor and first.cursor):
        await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, after_cursor=cursor))


async def test_a_cursor_after_all_removed_events_stays_good(service: Service) -> None:
    gone, kept = await submit(service, "gone"), await submit(service, "kept")
    await service.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=gone.name))
    await service.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name=gone.name))
    whole = await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT))
    await service.store.write(lambda conn: jobs.purge_events(conn, gone.uid), SYSTEM)
    watching = asyncio.create_task(follow(service, 1, after_cursor=whole.cursor))
    await emit(service, kept, 1)
    assert ids(await watching) == [f"{kept.uid}-2"]
    # A later, smaller removal does not make an old place look kept.
    place = await service.store.read(lambda conn: project_log.last_removal(conn, "default"))
    assert place == 1


async def test_a_cursor_of_a_store_that_was_restored_from_an_older_backup_is_ahead(service: Service) -> None:
    job = await submit(service, "story")
    cursors = Cursors(service.parts.tokens)
    lost = cursors.make("default", Place(10, 0))
    failure = await refused(service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, after_cursor=lost)))
    assert (failure.code.name, failure.reason) == ("OUT_OF_RANGE", "CURSOR_AHEAD")
    watching = asyncio.create_task(follow(service, 1, after_cursor=failure.metadata["cursor"]))
    await emit(service, job, 1)
    assert ids(await watching) == [f"{job.uid}-2"]


async def test_bad_requests_name_the_field(service: Service) -> None:
    job = await submit(service, "story")
    cursor = (await service.events.ListEvents(pb.ListEventsRequest(parent=PARENT))).cursor
    other = await refused(service.events.ListEvents(pb.ListEventsRequest(parent=OTHER, after_cursor=cursor)))
    assert (other.reason, list(other.violations)) == ("CURSOR_INVALID", ["after_cursor"])
    order = await refused(service.events.ListEvents(pb.ListEventsRequest(parent=PARENT, order_by="size")))
    assert "`time desc`" in order.violations["order_by"]
    both = pb.WatchEventsRequest(parent=PARENT, after_cursor=cursor, from_now=True)
    with pytest.raises(grpc.RpcError) as error:
        await service.events.WatchEvents(both).read()
    assert list(failure_of(error.value).violations) == ["from_now"]
    denied = await refused(service.events.ListEvents(pb.ListEventsRequest(parent="projects/secret")))
    assert denied.reason == "ACCESS_DENIED" and job.name
