"""Jobs that are accepted many at a time: each as it would be by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from helpers.clock import ManualClock
from helpers.core import ACTOR, add_model, new_job
from helpers.stores import store_at
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import CreatedJob, EventDraft, EventKind, EventRecord, NewJob
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.serve.submit import make_uid
from shardyard_coordinator.store import events, jobs, submissions
from shardyard_coordinator.store.store import Store, open_store
from shardyard_coordinator.store.submissions import Submission

ON_BOTH_STORES = True


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    yield opened
    await opened.close()


async def accept(store: Store, *new: NewJob) -> Sequence[CreatedJob | Exception]:
    together = [Submission(each, ACTOR) for each in new]
    return await store.write(lambda conn: submissions.create_jobs(conn, together, 1), ACTOR)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 150])
async def test_each_of_many_is_a_row_with_its_labels_uses_and_events(store: Store, count: int) -> None:
    await store.write(add_model, ACTOR)
    told: list[EventRecord] = []
    store.subscribe(told.extend)
    warning = EventDraft(EventKind.WARNING, b"")
    made = await accept(
        store,
        *(
            new_job(
                f"job-{at}",
                request_id=f"r-{at}",
                labels={"at": str(at), "of": str(count)},
                uses=("projects/default/models/m",),
                warnings=(warning,) * (at % 3),
            )
            for at in range(count)
        ),
    )
    assert len(told) == sum(1 + at % 3 for at in range(count))
    assert [record.position for record in told] == sorted(record.position for record in told)
    for at, created in enumerate(made):
        assert isinstance(created, CreatedJob)
        assert await store.read(lambda conn, at=at: jobs.get_job(conn, "default", f"job-{at}")) == created.job
        log = await store.read(lambda conn, uid=created.job.uid: events.events_after(conn, uid, 0, 10))
        assert [event.sequence for event in log] == list(range(1, 2 + at % 3))
        assert log == [event for event in told if event.job_uid == created.job.uid]


async def test_an_error_in_one_of_many_is_reported_for_it_alone_and_leaves_nothing(store: Store) -> None:
    await accept(store, new_job("taken", request_id="r-0", fingerprint=b"zero"))
    told: list[EventRecord] = []
    store.subscribe(told.extend)
    made = await accept(
        store,
        new_job("one", request_id="r-1", fingerprint=b"one"),
        new_job("taken", request_id="r-2", fingerprint=b"two"),
        new_job("again", request_id="r-0", fingerprint=b"zero"),
        new_job("reused", request_id="r-0", fingerprint=b"other"),
        new_job("twice", request_id="r-1", fingerprint=b"one"),
        new_job("reader", request_id="r-3", uses=("projects/default/models/gone",)),
        new_job("two"),
    )
    one, taken, again, reused, twice, reader, two = made
    assert isinstance(one, CreatedJob) and not one.existed
    assert isinstance(taken, Refused) and taken.reason is Reason.JOB_EXISTS
    assert isinstance(again, CreatedJob) and again.existed and again.job.job_id == "taken"
    assert isinstance(reused, Refused) and reused.reason is Reason.REQUEST_ID_REUSED
    assert isinstance(twice, CreatedJob) and twice.existed and twice.job.uid == one.job.uid
    assert isinstance(reader, Refused) and reader.reason is Reason.MODEL_NOT_FOUND
    assert isinstance(two, CreatedJob) and not two.existed
    assert {event.job_uid for event in told} == {one.job.uid, two.job.uid}
    assert await store.read(lambda conn: submissions.find_request(conn, "local", "r-2", b"two")) is None


def test_uids_are_version_7_and_in_the_order_of_their_times() -> None:
    made = [make_uid(1_700_000_000_000_000 + at * 1000) for at in range(100)]
    assert made == sorted(made) and len(set(made)) == 100
    assert all(len(uid) == 32 and uid[12] == "7" and uid[16] in "89ab" for uid in made)
    assert int(made[0][:12], 16) == 1_700_000_000_000
