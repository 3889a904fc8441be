"""UpdateJob, BatchCreateJobs, BatchCancelJobs, and filters by annotations and links, through the front door."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from helpers.core import ACTOR, new_job, running_core
from helpers.scripted_launcher import ScriptedLauncher
from helpers.service import PARENT, Service, create, refused, serving
from helpers.uploads import send_dataset
from shardyard.v1 import event_service_pb2, job_pb2
from shardyard.v1 import job_service_pb2 as pb
from shardyard_coordinator.serve.updating import update_job

NAME = f"{PARENT}/jobs/story"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path) as running:
        await send_dataset(running, "corpus", {"a.txt": b"to be or not to be\n"})
        yield running


def request(job_id: str | None = None, **fields: Any) -> pb.CreateJobRequest:
    made = create(job_id, **fields)
    made.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    return made


async def update(service: Service, job: job_pb2.Job, *paths: str, **more: Any) -> job_pb2.Job:
    made = pb.UpdateJobRequest(job=job, **more)
    made.update_mask.paths.extend(paths)
    return await service.jobs.UpdateJob(made)


async def found(service: Service, text: str) -> list[str]:
    answer = await service.jobs.ListJobs(pb.ListJobsRequest(parent=PARENT, filter=text))
    return sorted(each.name.rsplit("/")[-1] for each in answer.jobs)


async def log(service: Service) -> list[job_pb2.JobEvent]:
    page = await service.events.ListEvents(event_service_pb2.ListEventsRequest(parent=PARENT, page_size=1000))
    return [each.event for each in page.events]


async def test_an_annotation_whose_key_is_too_long_for_an_index_is_kept(service: Service) -> None:
    made, long = request("story"), random.Random(1).randbytes(6000).hex()  # Too long also once it is compressed.
    made.job.annotations.update({long: "kept", "ö" * 256: "found"})
    await service.jobs.CreateJob(made)
    after = await update(service, job_pb2.Job(name=NAME, labels={"team": "nlp"}), "labels.team")
    assert after.annotations[long] == "kept"
    assert await found(service, f"annotations.`{'ö' * 256}` = found") == ["story"]


async def test_labels_change_by_key_or_as_a_whole_and_filters_find_them(service: Service) -> None:
    made = request("story")
    made.job.labels.update(team="docs", stage="try")
    made.job.annotations.update({"ticket": "DOC-7", "note": "x" * 3000, "my key = 1": "odd", "cat.dog-2": "even"})
    made.job.external_uri = "https://example.org/runs/7"
    before = await service.jobs.CreateJob(made)
    assert await found(service, 'external_uri = "https://example.org/runs/7" AND annotations.ticket = DOC-7') == [
        "story"
    ]
    assert await found(service, 'external_uri : "runs/8"') == await found(service, "annotations.other : *") == []
    assert await found(service, "annotations.note : *") == await found(service, 'external_uri : "runs/7"') == ["story"]
    assert await found(service, "annotations.`my key = 1` = odd") == ["story"]
    assert await found(service, "annotations.cat.dog-2 = even AND labels.`team` = docs") == ["story"]
    changed = job_pb2.Job(name=NAME, labels={"team": "nlp"}, annotations={"ticket": "NLP-1"})
    after = await update(service, changed, "labels.team", "labels.stage", "annotations.ticket")
    assert dict(after.labels) == {"team": "nlp"} and after.annotations["note"] == "x" * 3000
    assert after.annotations["ticket"] == "NLP-1" and after.etag != before.etag
    assert await found(service, "labels.team = nlp") == await found(service, "annotations.ticket = NLP-1") == ["story"]
    assert await found(service, "labels.team = docs") == await found(service, "labels.stage : *") == []
    whole = await update(service, job_pb2.Job(name=NAME, labels={"a": "b"}), "labels", "external_uri")
    assert dict(whole.labels) == {"a": "b"} and whole.external_uri == ""
    assert await found(service, 'external_uri : "*"') == []
    [*_, last] = await log(service)
    assert list(last.updated.fields) == ["labels", "external_uri"] and last.updated.principal == "local"
    assert whole.last_event_sequence == last.sequence


async def test_without_a_mask_the_fields_that_are_set_change(service: Service) -> None:
    await service.jobs.CreateJob(request("story"))
    wanted = job_pb2.Job(name=NAME, display_name="Story", priority=job_pb2.PRIORITY_HIGH, state=job_pb2.STATE_FAILED)
    wanted.spec.retry.max = 3
    wanted.spec.max_run_time.FromSeconds(60)
    after = await update(service, wanted)
    assert (after.display_name, after.priority, after.state) == ("Story", job_pb2.PRIORITY_HIGH, job_pb2.STATE_QUEUED)
    for spec in (after.spec, after.resolved_spec):
        assert (spec.retry.max, spec.max_run_time.seconds) == (3, 60)
    assert after.spec.optimization.max_steps == 4
    same = await update(service, wanted)
    assert (same.etag, same.last_event_sequence) == (after.etag, after.last_event_sequence)
    cleared = await update(
        service, job_pb2.Job(name=NAME), "spec.max_run_time", "priority", "spec.checkpoints.keep_last"
    )
    assert not cleared.spec.HasField("max_run_time") and cleared.priority == job_pb2.PRIORITY_NORMAL
    assert cleared.resolved_spec.checkpoints.keep_last == 2 and not cleared.spec.checkpoints.HasField("keep_last")


async def test_what_cannot_change_is_refused_and_nothing_changes(service: Service) -> None:
    before = await service.jobs.CreateJob(request("story"))
    rows: list[tuple[job_pb2.Job, list[str], str, str, str]] = [
        (job_pb2.Job(name=NAME), ["lables"], "SPEC_INVALID", "update_mask.paths[0]", "did you mean `labels`"),
        (job_pb2.Job(name=NAME), ["priority", "spec"], "FIELD_IMMUTABLE", "update_mask.paths[1]", "cannot be changed"),
        (job_pb2.Job(name=NAME), ["spec.optimization.max_steps"], "FIELD_IMMUTABLE", "update_mask.paths[0]", "can"),
        (before, [], "FIELD_IMMUTABLE", "update_mask", "`spec.pretraining`"),
        (job_pb2.Job(name=NAME), [], "SPEC_INVALID", "update_mask", "nothing"),
        (job_pb2.Job(name=NAME, labels={"a": "b" * 64}), ["labels"], "SPEC_INVALID", 'job.labels["a"]', "63"),
        (
            job_pb2.Job(name=NAME, external_uri="file:///etc"),
            ["external_uri"],
            "SPEC_INVALID",
            "job.external_uri",
            "http",
        ),
        (job_pb2.Job(name=NAME, queue="other"), ["queue"], "QUEUE_NOT_FOUND", "job.queue", "default"),
        (job_pb2.Job(name=NAME, etag="old"), ["labels"], "ETAG_MISMATCH", "", "read it again"),
        (job_pb2.Job(name="story"), ["labels"], "SPEC_INVALID", "job.name", "projects/"),
        (job_pb2.Job(name=f"{PARENT}/jobs/none"), ["labels"], "JOB_NOT_FOUND", "", "no job"),
    ]
    for job, paths, reason, field, words in rows:
        made = pb.UpdateJobRequest(job=job)
        made.update_mask.paths.extend(paths)
        failure = await refused(service.jobs.UpdateJob(made))
        assert failure.reason == reason, (failure, paths)
        assert words in (failure.violations[field] if field else failure.message)
    many = pb.UpdateJobRequest(job=job_pb2.Job(name=NAME, labels={f"k{at}": "v" for at in range(64)}))
    many.update_mask.paths.append("labels")
    await service.jobs.UpdateJob(many)
    more = pb.UpdateJobRequest(job=job_pb2.Job(name=NAME, labels={"one": "more"}))
    more.update_mask.paths.append("labels.one")
    assert "65 in all" in (await refused(service.jobs.UpdateJob(more))).violations["job.labels"]
    bad = job_pb2.Job(name=NAME)
    bad.spec.max_run_time.FromSeconds(-5)
    bad.spec.retry.max = 101
    failure = await refused(update(service, bad))
    assert set(failure.violations) == {"job.spec.max_run_time", "job.spec.retry.max"}


async def test_validate_only_changes_nothing_and_an_ended_job_keeps_its_last_event(service: Service) -> None:
    before = await service.jobs.CreateJob(request("story"))
    tried = await update(service, job_pb2.Job(name=NAME, labels={"a": "b"}), "labels", validate_only=True)
    assert dict(tried.labels) == {"a": "b"}
    assert (await service.jobs.GetJob(pb.GetJobRequest(name=NAME))).etag == before.etag
    ended = await service.jobs.CancelJob(pb.CancelJobRequest(name=NAME))
    after = await update(service, job_pb2.Job(name=NAME, labels={"a": "b"}, etag=ended.etag), "labels")
    assert dict(after.labels) == {"a": "b"} and after.etag != ended.etag
    assert after.last_event_sequence == ended.last_event_sequence
    assert await found(service, "labels.a = b") == ["story"]
    late = pb.UpdateJobRequest(job=job_pb2.Job(name=NAME, priority=job_pb2.PRIORITY_HIGH))
    late.update_mask.paths.append("priority")
    assert (await refused(service.jobs.UpdateJob(late))).reason == "INVALID_STATE"


async def test_a_new_run_time_applies_to_the_attempt_that_runs(tmp_path: Path) -> None:
    """The update is an event that wakes the follower, whose deadline moves."""
    wanted = pb.UpdateJobRequest(job=job_pb2.Job())
    wanted.job.spec.max_run_time.FromMilliseconds(20)
    wanted.update_mask.paths.append("spec.max_run_time")
    launcher = ScriptedLauncher()
    launcher.ignores_directives = False
    async with running_core(tmp_path, launcher) as core:
        job = await core.submit(new_job())
        await core.when(job.uid, lambda _: bool(launcher.gangs))
        gang = launcher.newest()
        gang.canary()
        gang.progress(1)
        await core.when(job.uid, lambda job: bool(job.start_us))

        def change(conn: Any) -> Any:
            return update_job(conn, "default", "job", wanted, actor=ACTOR, now_us=core.clock.now_us())

        await core.store.write(change, ACTOR)
        ended = await core.when(job.uid, lambda job: job.state.is_terminal)
        log_ = await core.events(job.uid)
    assert b"MAX_RUN_TIME" in ended.failure
    assert [list(each.updated.fields) for each in log_ if each.HasField("updated")] == [["spec.max_run_time"]]


async def test_a_batch_is_accepted_as_a_whole_and_once(service: Service) -> None:
    batch = pb.BatchCreateJobsRequest(parent=PARENT)
    for at in range(5):
        each = request(f"job-{at}", request_id=str(uuid.uuid4()))
        each.parent = "" if at % 2 else PARENT
        each.job.labels["at"] = str(at)
        batch.requests.append(each)
    first = await service.jobs.BatchCreateJobs(batch)
    assert [job.name for job in first.jobs] == [f"{PARENT}/jobs/job-{at}" for at in range(5)]
    again = await service.jobs.BatchCreateJobs(batch)
    assert [job.uid for job in again.jobs] == [job.uid for job in first.jobs]
    single = request("job-1", request_id=batch.requests[1].request_id)
    single.job.labels["at"] = "1"
    assert (await service.jobs.CreateJob(single)).uid == first.jobs[1].uid
    assert len(await found(service, "labels.at : *")) == 5
    # A batch that repeats some and adds one is completed.
    batch.requests.append(request("job-5", request_id=str(uuid.uuid4())))
    assert len((await service.jobs.BatchCreateJobs(batch)).jobs) == 6


async def test_one_bad_job_refuses_the_batch_with_every_index(service: Service) -> None:
    await service.jobs.CreateJob(request("taken"))
    batch = pb.BatchCreateJobsRequest(parent=PARENT, requests=[request("a"), request("b"), request("a"), request("d")])
    batch.requests[0].job.labels["x\n"] = "y"
    batch.requests[1].job.spec.optimization.max_steps = -1
    batch.requests[1].request_id = "1"
    batch.requests[3].parent = "projects/other"
    failure = await refused(service.jobs.BatchCreateJobs(batch))
    fields = set(failure.violations)
    assert {"requests[1].request_id", "requests[2].job_id", "requests[3].parent"} <= fields
    assert any(field.startswith("requests[0].job.labels") for field in fields)
    assert "requests[1].job.spec.optimization.max_steps" in fields
    late = pb.BatchCreateJobsRequest(parent=PARENT, requests=[request("new"), request("taken"), request("more")])
    failure = await refused(service.jobs.BatchCreateJobs(late))
    assert (failure.code.name, failure.reason) == ("ALREADY_EXISTS", "JOB_EXISTS")
    assert list(failure.violations) == ["requests[1]"]
    late.requests[1].job_id = "other"
    late.requests[0].job.spec.train_data.dataset = f"{PARENT}/datasets/none"
    late.requests[2].job.queue = "none"
    failure = await refused(service.jobs.BatchCreateJobs(late))
    assert {field.split(".")[0] for field in failure.violations} == {"requests[0]", "requests[2]"}
    assert await found(service, "") == ["taken"]
    tried = pb.BatchCreateJobsRequest(parent=PARENT, requests=[request("x", validate_only=True)])
    assert (await service.jobs.BatchCreateJobs(tried)).jobs[0].name == f"{PARENT}/jobs/x"
    tried.requests.append(request("y"))
    assert "requests[1].validate_only" in (await refused(service.jobs.BatchCreateJobs(tried))).violations
    assert await found(service, "") == ["taken"]


@pytest.mark.parametrize("count", [0, 101])
async def test_a_batch_has_1_to_100_jobs(service: Service, count: int) -> None:
    batch = pb.BatchCreateJobsRequest(parent=PARENT, requests=[request() for _ in range(count)])
    assert list((await refused(service.jobs.BatchCreateJobs(batch))).violations) == ["requests"]


async def test_a_batch_of_cancels_is_one_change_and_ended_jobs_are_no_error(service: Service) -> None:
    names = []
    for at in range(4):
        names.append((await service.jobs.CreateJob(request(f"job-{at}"))).name)
    ended = await service.jobs.CancelJob(pb.CancelJobRequest(name=names[0]))
    wrong = pb.BatchCancelJobsRequest(parent=PARENT, names=[*names, f"{PARENT}/jobs/none", f"{PARENT}/jobs/nobody"])
    failure = await refused(service.jobs.BatchCancelJobs(wrong))
    assert (failure.reason, list(failure.violations)) == ("JOB_NOT_FOUND", ["names[4]", "names[5]"])
    assert await found(service, "state = QUEUED") == ["job-1", "job-2", "job-3"]
    done = await service.jobs.BatchCancelJobs(pb.BatchCancelJobsRequest(parent=PARENT, names=names))
    assert [job.name for job in done.jobs] == names and {job.state for job in done.jobs} == {job_pb2.STATE_CANCELLED}
    assert done.jobs[0].etag == ended.etag and not done.jobs[1].HasField("spec")
    bad = pb.BatchCancelJobsRequest(parent=PARENT, names=["story", names[1], names[1], "projects/other/jobs/a"])
    failure = await refused(service.jobs.BatchCancelJobs(bad))
    assert list(failure.violations) == ["names[0]", "names[2]", "names[3]"]
