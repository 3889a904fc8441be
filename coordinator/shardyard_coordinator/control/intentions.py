"""Requests of users about a job: pause it, resume it, declare its gang lost.

A request is recorded here, in one transaction with its event; the attempt's follower carries it out, even after a
restart of the coordinator.
"""

from __future__ import annotations

import logging
import random

from sqlalchemy import Connection

from shardyard.v1 import job_pb2
from shardyard_coordinator.control.ending import end_attempt, resumes_from
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.records import JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import attempts, audit, jobs

_log = logging.getLogger(__name__)
# A person has looked at the job: earlier failures no longer count.
_ANEW = {
    "failures": 0,
    "failures_in_row": 0,
    "failures_at_step": 0,
    "failure_cause": "",
    "failure_step": 0,
    "not_before_us": 0,
}


def request_pause(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Pauses the job: at once if it holds no slots, else it becomes PAUSING. Idempotent.

    Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED, ETAG_MISMATCH, INVALID_STATE.
    """
    job = jobs.own_job(conn, project, job_id, actor)
    if job.state in (JobState.PAUSING, JobState.PAUSED):
        return job
    jobs.check_etag(job, etag)
    if job.state is JobState.FINALIZING:
        raise jobs.invalid_state(job, "its training is over and its result is being written; wait for it, or cancel it")
    if job.state is JobState.CANCELLING:
        raise jobs.invalid_state(job, "it is being cancelled, so it cannot be paused")
    if job.state.is_terminal:
        raise jobs.invalid_state(job, "it has ended, so it cannot be paused")
    audit.record(conn, actor, job.name, now_us)
    message = f"paused by {actor.principal}"
    if job.state is JobState.QUEUED:
        message = f"{message}; a resume continues {resumes_from(job)}"
        return jobs.move(conn, job, JobState.PAUSED, now_us=now_us, message=message).job
    return jobs.move(conn, job, JobState.PAUSING, now_us=now_us, message=message).job


def request_resume(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Queues a paused job at its old position, with all of its retries. Idempotent while it is queued.

    Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED, ETAG_MISMATCH, INVALID_STATE.
    """
    job = jobs.own_job(conn, project, job_id, actor)
    if job.state is JobState.QUEUED:
        return job
    jobs.check_etag(job, etag)
    if job.state is JobState.PAUSING:
        raise jobs.invalid_state(job, "its gang is still being ended; resume it once it is PAUSED")
    if job.state is not JobState.PAUSED:
        raise jobs.invalid_state(job, "only a PAUSED job can be resumed")
    audit.record(conn, actor, job.name, now_us)
    message = f"resumed by {actor.principal}; it continues {resumes_from(job)}"
    return jobs.move(conn, job, JobState.QUEUED, now_us=now_us, message=message, changes=_ANEW).job


def declare_lost(conn: Connection, project: str, job_id: str, etag: str, *, actor: Actor, now_us: int) -> JobRecord:
    """Cancels the job although the cluster has not confirmed that its gang is gone; a person has. Idempotent.

    The attempt stays unreleased: what is left of the gang is ended if the cluster ever answers again.
    Raises: Refused JOB_NOT_FOUND, ACCESS_DENIED, ETAG_MISMATCH, INVALID_STATE (it has ended otherwise, or its gang can
    be reached).
    """
    job = jobs.own_job(conn, project, job_id, actor)
    attempt = attempts.get_attempt(conn, job.uid, job.epoch)
    if job.state.is_terminal or attempt is None or attempt.state is AttemptState.ENDED:
        return jobs.request_cancel(conn, project, job_id, etag, actor=actor, now_us=now_us)
    if job.state is not JobState.CANCELLING:
        jobs.check_etag(job, etag)
    held = job_pb2.Job.FromString(job.conditions).conditions
    if not any(each.type == job_pb2.Condition.TYPE_UNREACHABLE for each in held):
        rule = "its gang can be reached, so it is not lost; cancel it without `lost`"
        raise jobs.invalid_state(job, rule)
    audit.record(conn, actor, job.name, now_us)
    said = f"attempt {job.epoch} was declared lost by {actor.principal}"
    _log.warning("%s: %s (%s %s)", job.name, said, actor.method, actor.request_id)
    if job.state is not JobState.CANCELLING:
        jobs.move(conn, job, JobState.CANCELLING, now_us=now_us, message=f"cancelled by {actor.principal}")
    step = "if the cluster comes back, what is left of the gang is ended"
    lost = job_pb2.FailureReport(reason=Cause.RAY_LOST.value, message=said, next_step=step)
    rng = random.Random()  # Not drawn from: a cancelled job is not tried again.
    return end_attempt(conn, job.uid, job.epoch, ok=False, rng=rng, now_us=now_us, lost=lost)
