"""Jobs in the store: accepted once, moved by the table, listed in stable pages."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from helpers.clock import ManualClock
from helpers.core import ACTOR, add_model, new_job
from helpers.stores import store_at
from shardyard.v1 import job_pb2, job_service_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Condition, EventKind, EventRecord, JobRecord, NewJob
from shardyard_coordinator.domain.states import TRANSITIONS, JobState, may_move
from shardyard_coordinator.domain.steps import IllegalMove, StaleWrite
from shardyard_coordinator.seams import Actor, NullTrace
from shardyard_coordinator.serve.submit import make_uid
from shardyard_coordinator.store import encode, events, jobs, listing, submissions, tables
from shardyard_coordinator.store.store import Store, open_store

ON_BOTH_STORES = True


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    yield opened
    await opened.close()


async def create(store: Store, new: NewJob, now_us: int = 1, actor: Actor = ACTOR) -> JobRecord:
    return (await store.write(lambda conn: submissions.create_job(conn, new, actor, now_us), actor)).job


async def test_a_hundred_concurrent_submissions_with_one_request_id_make_one_job(store: Store) -> None:
    def submission(_index: int) -> NewJob:
        return new_job(request_id="r-1", fingerprint=b"same")

    made = await asyncio.gather(*(create(store, submission(index)) for index in range(100)))
    assert len({job.uid for job in made}) == 1
    assert len(await store.read(lambda conn: listing.list_jobs(conn, "default"))) == 1


async def test_a_request_id_with_another_request_is_refused_and_names_the_first_job(store: Store) -> None:
    await create(store, new_job("first", request_id="r-1", fingerprint=b"one"))
    with pytest.raises(Refused) as refused:
        await create(store, new_job("second", request_id="r-1", fingerprint=b"two"))
    assert refused.value.reason is Reason.REQUEST_ID_REUSED
    assert refused.value.metadata["first_job"] == "projects/default/jobs/first"


async def test_request_ids_of_two_principals_are_two(store: Store) -> None:
    one = await create(store, new_job("a", request_id="r-1", fingerprint=b"one"))
    two = await create(store, new_job("b", request_id="r-1", fingerprint=b"two"), actor=Actor("other", "CreateJob"))
    assert one.uid != two.uid


async def test_a_taken_id_is_refused_and_leaves_no_request_behind(store: Store) -> None:
    await create(store, new_job("job"))
    with pytest.raises(Refused) as refused:
        await create(store, new_job("job", request_id="r-1", fingerprint=b"one"))
    assert refused.value.reason is Reason.JOB_EXISTS
    assert await store.read(lambda conn: submissions.find_request(conn, "local", "r-1", b"one")) is None


async def test_the_record_that_create_answers_is_the_row(store: Store) -> None:
    await store.write(add_model, ACTOR)
    made = await create(store, new_job(display_name="x", labels={"a": "b"}, uses=("projects/default/models/m",)))
    assert await store.read(lambda conn: jobs.get_job(conn, "default", "job")) == made
    assert await store.read(lambda conn: jobs.get_job_by_uid(conn, made.uid)) == made


async def test_one_refusal_in_a_batch_reaches_its_own_caller_only(store: Store) -> None:
    names = [f"job-{index // 2}" for index in range(20)]
    made = await asyncio.gather(*(create(store, new_job(name)) for name in names), return_exceptions=True)
    assert sum(isinstance(each, JobRecord) for each in made) == 10
    assert sum(isinstance(each, Refused) for each in made) == 10


async def test_events_are_dense_under_concurrent_writers_and_published_after_their_commit_in_order(
    store: Store,
) -> None:
    job = await create(store, new_job())
    told: list[EventRecord] = []
    store.subscribe(told.extend)
    draft = encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=1)))

    def append(conn: Any) -> list[EventRecord]:
        return events.append(conn, job.uid, [draft, draft], 2)

    await asyncio.gather(*(store.write(append, ACTOR) for _ in range(200)))
    log = await store.read(lambda conn: events.events_after(conn, job.uid, 0, 10_000))
    assert [record.sequence for record in log] == list(range(1, 402))
    positions = [record.position for record in log]
    assert positions == sorted(set(positions))
    assert told == log[1:]
    now = await store.read(lambda conn: jobs.get_job_by_uid(conn, job.uid))
    assert now is not None and now.last_sequence == 401 and now.etag != job.etag


async def test_an_operation_that_fails_leaves_and_publishes_no_event(store: Store) -> None:
    job = await create(store, new_job())
    told: list[EventRecord] = []
    store.subscribe(told.extend)

    def fail(conn: Any) -> None:
        jobs.move(conn, job, JobState.PREPARING, now_us=2)
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        await store.write(fail, ACTOR)
    assert await store.read(lambda conn: jobs.get_job_by_uid(conn, job.uid)) == job
    assert told == []


async def test_move_takes_the_steps_of_the_table_and_no_other(store: Store) -> None:
    job = await create(store, new_job())

    def force(conn: Any, state: JobState) -> None:
        conn.execute(tables.job.update().values(state=state.value, end_us=0))

    for source, target in itertools.product(JobState, JobState):
        await store.write(partial(force, state=source), ACTOR)
        step = partial(jobs.move, job=replace(job, state=source), to=target, now_us=5)
        if not may_move(source, target):
            with pytest.raises(IllegalMove):
                await store.write(step, ACTOR)
            continue
        moved = await store.write(step, ACTOR)
        change = encode.event_to_proto(moved.event).state
        assert job_pb2.State.Name(getattr(change, "from")) == f"STATE_{source}"
        assert job_pb2.State.Name(change.to) == f"STATE_{target}"
        assert (moved.job.state, moved.job.end_us) == (target, 5 if target.is_terminal else 0)


async def test_a_stale_writer_moves_nothing(store: Store) -> None:
    job = await create(store, new_job())
    await store.write(lambda conn: jobs.move(conn, job, JobState.PREPARING, now_us=2, changes={"epoch": 1}), ACTOR)
    with pytest.raises(StaleWrite):
        await store.write(lambda conn: jobs.move(conn, job, JobState.CANCELLED, now_us=3), ACTOR)
    late = replace(job, state=JobState.PREPARING)  # The right state, but one attempt too old.
    with pytest.raises(StaleWrite):
        await store.write(lambda conn: jobs.move(conn, late, JobState.RUNNING, now_us=3), ACTOR)


def test_what_is_terminal_follows_from_the_table() -> None:
    assert {state for state in JobState if state.is_terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }
    assert set(TRANSITIONS) == set(JobState)


def test_the_kinds_of_events_are_those_of_the_contract() -> None:
    wire = {name.removeprefix("EVENT_KIND_"): number for name, number in job_service_pb2.EventKind.items() if number}
    assert wire == {kind.name: int(kind) for kind in EventKind}


async def test_an_etag_guards_cancel_and_delete(store: Store) -> None:
    job = await create(store, new_job())
    for operation in (jobs.request_cancel, jobs.delete_job):
        with pytest.raises(Refused) as refused:
            await store.write(
                lambda conn, op=operation: op(conn, "default", "job", "other", actor=ACTOR, now_us=2), ACTOR
            )
        assert refused.value.reason is Reason.ETAG_MISMATCH
    done = await store.write(
        lambda conn: jobs.request_cancel(conn, "default", "job", job.etag, actor=ACTOR, now_us=2), ACTOR
    )
    assert done.state is JobState.CANCELLED


async def test_a_deleted_job_frees_its_name_and_keeps_its_last_event(store: Store) -> None:
    job = await create(store, new_job(request_id="r-1", fingerprint=b"one"))
    delete = lambda conn: jobs.delete_job(conn, "default", "job", "", actor=ACTOR, now_us=3)  # noqa: E731
    with pytest.raises(Refused) as refused:
        await store.write(delete, ACTOR)
    assert refused.value.reason is Reason.INVALID_STATE
    await store.write(lambda conn: jobs.request_cancel(conn, "default", "job", "", actor=ACTOR, now_us=2), ACTOR)
    await store.write(delete, ACTOR)
    again = await create(store, new_job(), now_us=4)
    log = await store.read(lambda conn: events.events_after(conn, job.uid, 0, 100))
    assert [record.kind for record in log][-1] is EventKind.DELETED
    assert again.uid != job.uid
    found = await store.read(lambda conn: submissions.find_request(conn, "local", "r-1", b"one"))
    assert found is not None and found.deleted_us == 3
    await store.write(lambda conn: jobs.purge_job(conn, job.uid), ACTOR)
    assert await store.read(lambda conn: jobs.get_job_by_uid(conn, job.uid)) is None
    assert await store.read(lambda conn: jobs.get_job(conn, "default", "job")) == again


@pytest.mark.parametrize("order_by", ["create_time", "end_time", "display_name", "priority"])
@pytest.mark.parametrize("desc", [True, False])
async def test_pages_are_complete_and_stable_while_jobs_are_added(store: Store, order_by: str, desc: bool) -> None:
    for index in range(9):
        new = new_job(f"job-{index}", display_name=f"n{index % 3}", priority=index % 2)
        await create(store, new, now_us=10 + index // 2)
    seen: list[str] = []
    after = None
    for number in itertools.count():
        page = await store.read(
            lambda conn, key=after: listing.list_jobs(conn, "default", order_by=order_by, desc=desc, after=key, limit=2)
        )
        if not page:
            break
        seen += [job.job_id for job in page if job.job_id.startswith("job-")]
        after = listing.order_key(page[-1], order_by)
        if number < 5:
            await create(store, new_job(f"late-{number}", display_name="n1", priority=1), now_us=12)
    assert sorted(seen) == [f"job-{index}" for index in range(9)]


FILTERS = [
    (Condition("state", "=", "QUEUED"), ["a", "b", "c"]),
    (Condition("state", "!=", "QUEUED"), []),
    (Condition("display_name", ":", "LP"), ["a"]),
    (Condition("display_name", ":", "%"), []),
    (Condition("priority", ">=", 3), ["b", "c"]),
    (Condition("create_time", "<", 12), ["a", "b"]),
    (Condition("labels.team", "=", "nlp"), ["a"]),
    (Condition("labels.team", "!=", "nlp"), ["b", "c"]),
    (Condition("labels.team", ":", "*"), ["a", "b"]),
    (Condition("labels.team", ":", "is"), ["b"]),
    (Condition("queue", "=", "default"), ["a", "b", "c"]),
    (Condition("creator", "=", "nobody"), []),
]


@pytest.mark.parametrize(("condition", "expected"), FILTERS, ids=str)
async def test_conditions_select(store: Store, condition: Condition, expected: list[str]) -> None:
    for index, (name, shown, labels) in enumerate(
        [("a", "aLPha", {"team": "nlp"}), ("b", "beta", {"team": "vision"}), ("c", "", {})]
    ):
        await create(store, new_job(name, display_name=shown, labels=labels, priority=2 + index), now_us=10 + index)
    page = await store.read(lambda conn: listing.list_jobs(conn, "default", conditions=[condition], desc=False))
    assert [job.job_id for job in page] == expected
    assert all(job.spec == b"" for job in page)


async def test_an_unknown_field_or_operator_is_refused(store: Store) -> None:
    for condition in (Condition("color", "=", "red"), Condition("state", "~", "x")):
        with pytest.raises(Refused) as refused:
            await store.read(lambda conn, c=condition: listing.list_jobs(conn, "default", conditions=[c]))
        assert refused.value.reason is Reason.FILTER_INVALID


async def test_a_page_of_whole_jobs_ends_with_the_one_that_is_over_its_bytes(store: Store) -> None:
    for at in range(100):
        new = replace(new_job(f"job-{at}"), spec=b"s" * 600, resolved_spec=b"r" * 400, plan=b"p" * 9000)
        await create(store, new, now_us=at)
    page = await store.read(lambda conn: listing.list_jobs(conn, "default", limit=1000, full=True, max_bytes=5500))
    assert [job.job_id for job in page] == [f"job-{at}" for at in range(99, 93, -1)]
    assert all(job.spec and job.resolved_spec and not job.plan for job in page)


async def test_of_deleted_jobs_only_those_with_something_left_are_looked_at(store: Store) -> None:
    for name, deleted_us in (("purged", 1000), ("fresh", 2000), ("forgotten", 100)):
        job = await create(store, new_job(name))
        await store.write(lambda c, n=name: jobs.request_cancel(c, "default", n, "", actor=ACTOR, now_us=2), ACTOR)
        delete = partial(jobs.delete_job, project="default", job_id=name, etag="", actor=ACTOR, now_us=deleted_us)
        await store.write(delete, ACTOR)
        if name != "fresh":
            await store.write(partial(jobs.purge_events, job_uid=job.uid), ACTOR)
    left = await store.read(partial(jobs.deleted_jobs, purged_before_us=500))
    assert sorted(deleted_us for _, deleted_us in left) == [100, 2000]


async def test_etags_of_jobs_made_in_one_moment_differ(store: Store) -> None:
    one, two = [await create(store, new_job(name, uid=make_uid(1_700_000_000_000_000))) for name in ("a", "b")]
    assert one.version == two.version and one.etag != two.etag
