"""CreateJob: exactly once, and only after inspection."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, job_service_pb2, plan_pb2
from shardyard_coordinator.control.formats import part_of
from shardyard_coordinator.control.spec_walk import WalkedSpec, task_of, walk
from shardyard_coordinator.domain.access import LOCAL_PRINCIPAL
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import CreatedJob, JobRecord, NewJob
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.buckets import Buckets
from shardyard_coordinator.serve.call import Call
from shardyard_coordinator.serve.fetching import Fetching
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.plans import Located, Planned, Plans
from shardyard_coordinator.serve.targets import check_targets
from shardyard_coordinator.serve.validation import names
from shardyard_coordinator.store import encode, jobs, submissions
from shardyard_coordinator.store.submissions import Submission
from shardyard_coordinator.store.together import Together, writes_together

DEFAULT_QUEUE = "default"
# Seeded once: asking the system for every id costs as much as a whole validation.
_RANDOM = random.Random()
_ALPHABET = string.ascii_lowercase + string.digits


class Submitter:
    """Accepts jobs. To retry an accepted one, its request id is enough."""

    def __init__(self, parts: Parts, plans: Plans) -> None:
        self._parts = parts
        self._plans = plans
        self._fetching = Fetching(parts)
        self._rates = Buckets(parts.limits.max_submit_burst, parts.limits.submits_per_s, parts.clock)
        self._creates: Together[Submission, CreatedJob] = writes_together(
            parts.store, self._insert, SYSTEM, size=lambda each: len(each.new.spec) + len(each.new.plan)
        )

    async def create(self, request: job_service_pb2.CreateJobRequest, call: Call) -> job_pb2.Job:
        """Accepts the job durably and returns it; with `validate_only` only returns what it would be."""
        parts = self._parts
        parts.trace.point("create.received")
        self.check_rate(call)
        new = await self.prepare(request, call)
        if isinstance(new, JobRecord):
            return encode.job_to_proto(new)
        parts.trace.point("create.validated")
        if request.validate_only:
            return await self.preview(request, new, call)
        with parts.spans.span("commit", call.traceparent):
            created = await self._creates.ask(Submission(new, call.actor))
        parts.trace.point("job.committed")
        answer = encode.job_to_proto(created.job)
        parts.trace.point("job.replied")
        return answer

    async def prepare(self, request: job_service_pb2.CreateJobRequest, call: Call) -> NewJob | JobRecord:
        """Plans the job, and returns it as it would be inserted, or the job that the request has made already."""
        project = self._parts.name("project", request.parent).project
        request.request_id = request.request_id.lower()  # One UUID, however it is written.
        fingerprint = request_fingerprint(request)
        walked = walk(request.job.spec)
        check_targets(self._parts.remote, walked, project)
        planned = await self._plans.at_hand(walked)
        if planned is None or not _is_as_planned(request, planned):
            if walked.remotes or walked.private:
                known = await self._parts.store.read(lambda conn: _known(conn, request, call, fingerprint))
                if known is not None:
                    return known
                walked = await self._fetching.pinned(walked, project, call)
            found = await self._look(request, walked, call, fingerprint)
            if isinstance(found, JobRecord):
                return found
            queue_of(request.job)
            with self._parts.spans.span("plan", call.traceparent):
                planned = await self._plans.plan(found, call)
            _check_plan(request, planned)
        _check_fit(planned)
        queue, now_us = queue_of(request.job), self._parts.clock.now_us()
        return new_job(
            request,
            project,
            queue,
            planned,
            walked,
            fingerprint=fingerprint,
            now_us=now_us,
            traceparent=call.traceparent,
        )

    def check_rate(self, call: Call, count: int = 1) -> None:
        """Refused RATE_LIMITED if the caller submits too fast; the only one on loopback is not limited."""
        if call.principal == LOCAL_PRINCIPAL or self._rates.take(call.principal, count):
            return
        limits = self._parts.limits
        text = f"over {limits.submits_per_s} submits a second, and {limits.max_submit_burst} at once; wait a moment"
        raise Refused(Reason.RATE_LIMITED, text, retry_after_s=max(self._rates.wait_s(call.principal, count), 0.1))

    def _insert(self, conn: Connection, items: Sequence[Submission]) -> Sequence[CreatedJob | Exception]:
        refused = self.without_room(conn, items)
        fitting = [each for at, each in enumerate(items) if at not in refused]
        created = iter(submissions.create_jobs(conn, fitting, self._parts.clock.now_us()) if fitting else ())
        self._parts.trace.point("job.inserted")
        return [refused[at] if at in refused else next(created) for at in range(len(items))]

    def without_room(self, conn: Connection, items: Sequence[Submission]) -> dict[int, Refused]:
        """Those whose projects have too many jobs already, by their place; retries of accepted ones are not."""
        most = self._parts.limits.max_project_jobs
        rooms: dict[str, int] = {}
        refused: dict[int, Refused] = {}
        for at, (new, actor) in enumerate(items):
            if actor.principal == LOCAL_PRINCIPAL:
                continue
            if new.project not in rooms:
                rooms[new.project] = most - jobs.num_live(conn, new.project)
            if rooms[new.project] > 0:
                rooms[new.project] -= 1
                continue
            try:
                known = submissions.find_request(conn, actor.principal, new.request_id, new.fingerprint)
            except Refused as error:
                refused[at] = error
                continue
            if known is None:
                text = f"projects/{new.project} has {most:,} jobs that have not ended, the most allowed; cancel some"
                refused[at] = Refused(Reason.QUOTA_EXCEEDED, text)
        return refused

    async def _look(
        self, request: job_service_pb2.CreateJobRequest, walked: WalkedSpec, call: Call, fingerprint: bytes
    ) -> JobRecord | Located:
        """The job that the request has made already, so that a retry is not planned again; else the plan's input."""

        def look(conn: Connection) -> JobRecord | Located:
            known = _known(conn, request, call, fingerprint)
            return known if known is not None else self._plans.locate(conn, walked, call)

        found: JobRecord | Located = await self._plans.reads(walked).ask(look)
        return found

    async def plan(self, request: job_service_pb2.PlanJobRequest, call: Call) -> plan_pb2.JobPlan:
        """Plans a job; changes nothing."""
        project = self._parts.name("project", request.parent).project
        walked = walk(request.job.spec)
        check_targets(self._parts.remote, walked, project)
        walked = await self._fetching.pinned(walked, project, call)
        located = await self._plans.reads(walked).ask(lambda conn: self._plans.locate(conn, walked, call))
        queue_of(request.job)
        planned = await self._plans.plan(located, call)
        plan = plan_pb2.JobPlan.FromString(planned.plan)
        price = self._parts.slot_hour_price
        if price is not None and plan.HasField("time"):
            plan.time.cost, plan.time.currency = plan.time.slot_hours * price, self._parts.currency
        return plan

    async def preview(self, request: job_service_pb2.CreateJobRequest, new: NewJob, call: Call) -> job_pb2.Job:
        """What the job would be. Raises: Refused JOB_EXISTS, REQUEST_ID_REUSED."""

        def check(conn: Connection) -> None:
            if new.request_id and submissions.find_request(conn, call.principal, new.request_id, new.fingerprint):
                return  # Without validate_only it would return the job that it has made.
            try:
                jobs.get_job(conn, new.project, new.job_id)
            except Refused:
                return
            text = f"`{new.job_id}` is taken in projects/{new.project}; choose another job_id, or leave it out"
            raise Refused(Reason.JOB_EXISTS, text)

        await self._parts.store.read(check)
        job = job_pb2.Job()
        job.CopyFrom(request.job)
        job.traceparent = ""  # The service's, not the caller's.
        job.name = names.job_name(new.project, new.job_id)
        job.queue = f"queues/{new.queue}"
        job.priority = new.priority  # type: ignore[assignment]
        job.resolved_spec.ParseFromString(new.resolved_spec)
        return job


def _known(
    conn: Connection, request: job_service_pb2.CreateJobRequest, call: Call, fingerprint: bytes
) -> JobRecord | None:
    """The job that the request has made already."""
    if not request.request_id or request.validate_only:
        return None
    return submissions.find_request(conn, call.principal, request.request_id, fingerprint)


def new_job(
    request: job_service_pb2.CreateJobRequest,
    project: str,
    queue: str,
    planned: Planned,
    walked: WalkedSpec,
    *,
    fingerprint: bytes,
    now_us: int,
    traceparent: str = "",
) -> NewJob:
    """The row of a job that has been planned."""
    job = request.job
    task = task_of(job.spec)
    description = job_pb2.Job(
        labels=job.labels, annotations=job.annotations, external_uri=job.external_uri, traceparent=traceparent
    )
    return NewJob(
        project=project,
        job_id=request.job_id if request.HasField("job_id") else make_id(task),
        uid=make_uid(now_us),
        request_id=request.request_id,
        fingerprint=fingerprint,
        display_name=job.display_name,
        labels=dict(job.labels),
        description=description.SerializeToString(deterministic=True),
        queue=queue,
        priority=int(job.priority or job_pb2.PRIORITY_NORMAL),
        task=task,
        spec=job.spec.SerializeToString(deterministic=True),
        resolved_spec=planned.resolved_spec,
        plan=planned.plan,
        workers=planned.workers,
        gpus_per_worker=planned.gpus_per_worker,
        cpus_per_worker=planned.cpus_per_worker,
        uses=walked.uses,
        warnings=planned.warnings,
        adds=part_of(job.spec),
        attributes=encode.attributes_of(description),
    )


def _is_as_planned(request: job_service_pb2.CreateJobRequest, planned: Planned) -> bool:
    return not request.plan_etag or request.plan_etag == planned.etag


def _check_plan(request: job_service_pb2.CreateJobRequest, planned: Planned) -> None:
    """Refused PLAN_STALE if the caller expects another plan."""
    if not _is_as_planned(request, planned):
        text = (
            f"the job would not run as in the plan `{request.plan_etag}`: its data, its models or the defaults have "
            f"changed; the plan now is `{planned.etag}`: look at it, and submit with its etag"
        )
        raise Refused(Reason.PLAN_STALE, text, metadata={"etag": planned.etag})


def _check_fit(planned: Planned) -> None:
    """Refused MODEL_DOES_NOT_FIT, with what would fit; PlanJob shows such a plan."""
    if planned.does_not_fit:
        raise refused_fields([FieldViolation("job.spec.model", planned.does_not_fit, Reason.MODEL_DOES_NOT_FIT)])


def queue_of(job: job_pb2.Job) -> str:
    """The id of the job's queue; Refused QUEUE_NOT_FOUND."""
    queue = job.queue.removeprefix("queues/") or DEFAULT_QUEUE
    if queue != DEFAULT_QUEUE:
        text = f"there is no queue `queues/{queue}`; use `queues/{DEFAULT_QUEUE}`, or leave it out"
        violation = FieldViolation("job.queue", text, Reason.QUEUE_NOT_FOUND)
        raise Refused(Reason.QUEUE_NOT_FOUND, text, violations=[violation])
    return queue


def make_uid(now_us: int) -> str:
    """A UUID version 7 (RFC 9562), without its hyphens: rows made at the same time are neighbours in every index."""
    random_a, random_b = _RANDOM.getrandbits(12), _RANDOM.getrandbits(62)
    return f"{now_us // 1000 << 80 | 7 << 76 | random_a << 64 | 2 << 62 | random_b:032x}"


def make_id(task: str) -> str:
    """A new job id such as `text-classification-ab12cd34`."""
    return f"{task.replace('_', '-')}-{''.join(_RANDOM.choices(_ALPHABET, k=8))}"


def request_fingerprint(request: job_service_pb2.CreateJobRequest) -> bytes:
    """Identifies the requested job: what two calls are compared by, apart from request_id and validate_only.

    Unknown fields are dropped first; the leading 1 is the format's version.
    """
    request.DiscardUnknownFields()  # type: ignore[attr-defined]
    kept, tried = request.request_id, request.validate_only
    request.request_id, request.validate_only = "", False
    digest = hashlib.sha256(b"1" + request.SerializeToString(deterministic=True)).digest()
    request.request_id, request.validate_only = kept, tried
    return digest
