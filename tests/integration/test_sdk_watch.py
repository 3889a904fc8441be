"""`watch()`: exactly once in the iterator, whatever happens on the wire."""

from __future__ import annotations

import random

import grpc
import pytest

from helpers.script import Failure, Script
from helpers.scripted_service import a_job, a_story, serving
from shardyard import Aborted, AsyncClient, Client, DataLoss, NotFound, OutOfRange, Unavailable

SUCCEEDED = 9


def watched(script: Script, **options: object) -> list[int]:
    with serving(script) as address, Client(address) as client:
        return [event.sequence for event in client.job(script.job.name).watch(**options)]  # type: ignore[arg-type]


def test_an_undisturbed_watch_yields_every_event_and_ends() -> None:
    script = Script(job=a_job(), events=a_story())
    assert watched(script) == list(range(1, 12))
    assert len(script.asked("WatchJob")) == 1


def test_a_watch_cut_at_random_100_times_yields_every_event_once() -> None:
    chance = random.Random(7)
    script = Script(job=a_job(), events=a_story(200), cuts=[chance.randint(0, 4) for _ in range(100)], overlap=5)
    assert watched(script) == list(range(1, 206))
    assert len(script.asked("WatchJob")) > 50


async def test_the_async_watch_survives_cuts_too() -> None:
    script = Script(job=a_job(), events=a_story(), cuts=[2, 0, 5])
    with serving(script) as address:
        async with AsyncClient(address) as client:
            job = await client.job("story")
            assert [event.sequence async for event in job.watch()] == list(range(1, 12))


def test_a_watch_continues_after_the_sequence_given_and_names_the_jobs_uid() -> None:
    script = Script(job=a_job(), events=a_story())
    assert watched(script, after=8) == [9, 10, 11]
    asked = script.asked("WatchJob")[0]
    assert (asked.after_sequence, asked.job_uid) == (8, script.job.uid)


def test_a_gap_is_asked_for_again() -> None:
    script = Script(job=a_job(), events=a_story(), skip_once=4)
    assert watched(script) == list(range(1, 12))
    assert [request.after_sequence for request in script.asked("WatchJob")] == [0, 0]


def test_a_gap_that_stays_is_an_error_and_never_a_silent_skip() -> None:
    script = Script(job=a_job(), events=a_story()[3:])
    with pytest.raises(DataLoss) as caught:
        watched(script)
    assert caught.value.reason == "EVENT_GAP"


def test_a_stream_that_ends_early_is_opened_again_until_the_job_has_ended() -> None:
    script = Script(job=a_job(), events=a_story())
    late, script.events = script.events[7:], script.events[:7]
    with serving(script) as address, Client(address) as client:
        seen = []
        for event in client.job("story").watch():
            seen.append(event.sequence)
            if event.sequence == 7:
                script.events = script.events + late
    assert seen == list(range(1, 12))


def test_a_watch_after_the_last_event_of_an_ended_job_ends() -> None:
    job = a_job(state=SUCCEEDED)
    job.last_event_sequence = 11
    assert watched(Script(job=job, events=a_story()), after=11) == []


def test_only_the_requested_kinds_come_and_the_others_are_not_gaps() -> None:
    script = Script(job=a_job(state=SUCCEEDED), events=a_story())
    script.job.last_event_sequence = 11
    assert watched(script, kinds=["progress"]) == [4, 5, 6, 7, 8, 9]


def test_events_read_as_data_and_as_lines() -> None:
    script = Script(job=a_job(), events=a_story())
    with serving(script) as address, Client(address) as client:
        events = list(client.job("story").watch())
    assert events[0].state == "queued"
    assert events[5].progress is not None and events[5].progress.step == 3
    assert "step 3/6" in str(events[5])
    assert "finalizing → succeeded" in str(events[-1])


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure(grpc.StatusCode.ABORTED, "JOB_REPLACED"), Aborted),
        (Failure(grpc.StatusCode.OUT_OF_RANGE, "CURSOR_EXPIRED", metadata={"oldest_sequence": "9"}), OutOfRange),
        (Failure(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"), NotFound),
    ],
)
def test_an_error_that_another_try_cannot_fix_is_raised(failure: Failure, error: type[Exception]) -> None:
    script = Script(job=a_job(), events=a_story(), failures={"WatchJob": [failure]})
    with pytest.raises(error) as caught:
        watched(script)
    assert caught.value.reason == failure.reason  # type: ignore[attr-defined]
    assert caught.value.metadata == failure.metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("reason", ["SLOW_CONSUMER", "TOO_MANY_WATCHERS"])
def test_what_the_service_asks_to_be_tried_again_is(reason: str) -> None:
    failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, retry_after_s=0.01)
    script = Script(job=a_job(), events=a_story(), failures={"WatchJob": [failure, failure]})
    assert watched(script) == list(range(1, 12))


def test_patience_ends_when_nothing_arrives_for_long() -> None:
    script = Script(job=a_job(), events=a_story(), cuts=[4] + [0] * 1000)
    with serving(script) as address, Client(address, reconnect_for=0.5) as client:
        job = client.job("story")
        seen = []
        with pytest.raises(Unavailable):
            for event in job.watch():
                seen.append(event.sequence)
    assert seen == [1, 2, 3, 4]


def test_leaving_a_watch_does_not_cancel_the_job() -> None:
    script = Script(job=a_job(), events=a_story())
    with serving(script) as address, Client(address) as client:
        for event in client.job("story").watch():
            if event.sequence == 2:
                break
    assert script.asked("CancelJob") == []


def test_a_service_that_comes_back_is_watched_on() -> None:
    script = Script(job=a_job(), events=a_story())
    with serving(script) as address:
        client = Client(address, reconnect_for=20)
        job = client.job("story")
        watch = job.watch()
        first = [next(watch).sequence for _ in range(3)]
    with serving(script, port=int(address.rsplit(":", 1)[1])):
        rest = [event.sequence for event in watch]
        client.close()
    assert first + rest == list(range(1, 12))
