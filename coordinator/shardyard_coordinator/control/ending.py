"""The end of an attempt: what it is called, and whether the job ends with it or is tried again (docs/states.md)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, spec_pb2
from shardyard_coordinator.domain.advice import ADVICE
from shardyard_coordinator.domain.causes import VERDICTS, Cause, Verdict
from shardyard_coordinator.domain.records import AttemptRecord, EventKind, JobRecord
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.store import attempts, encode, events, jobs

# Losing the same step again and again is a loop, whatever the budget.
MAX_FAILURES_AT_STEP = 3
_REFILL_US = 3_600_000_000
_NOT_COUNTED = (Cause.PREEMPTED, Cause.DRAINED)


def lose_attempt(conn: Connection, job_uid: str, epoch: int, failure: job_pb2.FailureReport, now_us: int) -> None:
    """The gang is lost, but not yet confirmed gone: the intention to replace it is recorded before it is killed."""
    job, attempt = _current(conn, job_uid, epoch)
    report = _fill(failure, attempt)
    if attempt.state is not AttemptState.STOPPING:
        changes = {"failure": attempt.failure or report}
        attempt = attempts.move_attempt(conn, job, attempt, AttemptState.STOPPING, now_us=now_us, changes=changes)
    if job.state in (JobState.PREPARING, JobState.RUNNING, JobState.FINALIZING) and not attempt.exported:
        jobs.move(conn, job, JobState.RECOVERING, now_us=now_us, failure=attempt.failure or report)


def stop_attempt(conn: Connection, job_uid: str, epoch: int, reason: str, now_us: int) -> AttemptRecord:
    """The gang is going to be told to stop: recorded before it is told. Idempotent."""
    job, attempt = _current(conn, job_uid, epoch)
    if attempt.state is AttemptState.STOPPING:
        return attempt
    changes = {"stop_reason": reason}
    return attempts.move_attempt(conn, job, attempt, AttemptState.STOPPING, now_us=now_us, changes=changes)


def end_attempt(conn: Connection, job_uid: str, epoch: int, *, ok: bool, rng: random.Random, now_us: int) -> JobRecord:
    """Nothing of the gang runs any more: its slots are free, and the job takes its next step.

    `ok`: every rank ended well. Raises: StaleWrite where the attempt had ended already.
    """
    job, attempt = _current(conn, job_uid, epoch)
    report = b"" if attempt.exported else _report(attempt, ok=ok, cancelling=job.state is JobState.CANCELLING)
    held_s = max(now_us - attempt.create_us, 0) / 1e6
    changes: dict[str, Any] = {"slot_seconds": job.slot_seconds + held_s * attempt.workers * attempt.slots_per_worker}
    if job.conditions:
        changes["conditions"] = None
        _end_conditions(conn, job, now_us)
    attempt = attempts.move_attempt(
        conn, job, attempt, AttemptState.ENDED, now_us=now_us, changes={"failure": report or None}
    )
    jobs.change_job(conn, job.uid, now_us, changes)
    if job.state is JobState.CANCELLING:
        return jobs.move(conn, job, JobState.CANCELLED, now_us=now_us).job
    if attempt.exported:
        return _succeed(conn, job, ok=ok, now_us=now_us)
    return _retry_or_fail(conn, job, attempt, job_pb2.FailureReport.FromString(report), rng=rng, now_us=now_us)


def _end_conditions(conn: Connection, job: JobRecord, now_us: int) -> None:
    """What was true of the gang is not true of what follows it."""
    held = job_pb2.Job.FromString(job.conditions).conditions
    over = [job_pb2.Condition(type=each.type, active=False, time=encode.timestamp(now_us)) for each in held]
    told = [encode.draft(EventKind.CONDITION, job_pb2.JobEvent(condition=each), job.epoch) for each in over]
    events.append(conn, job.uid, told, now_us)


def _current(conn: Connection, job_uid: str, epoch: int) -> tuple[JobRecord, AttemptRecord]:
    job = jobs.get_job_by_uid(conn, job_uid)
    attempt = attempts.get_attempt(conn, job_uid, epoch)
    if job is None or attempt is None or job.epoch != epoch or attempt.state is AttemptState.ENDED:
        raise StaleWrite(f"attempt {epoch} of job {job_uid} is over")
    return job, attempt


def _succeed(conn: Connection, job: JobRecord, *, ok: bool, now_us: int) -> JobRecord:
    """The result is in place and verified, so how the processes ended only deserves a warning."""
    if not ok:
        warning = job_pb2.Warning(reason="UNCLEAN_EXIT", message="a rank failed after its result had been verified")
        draft = encode.draft(EventKind.WARNING, job_pb2.JobEvent(warning=warning), job.epoch)
        events.append(conn, job.uid, [draft], now_us)
    if job.state is JobState.RUNNING:
        job = jobs.move(conn, job, JobState.FINALIZING, now_us=now_us).job
    return jobs.move(conn, job, JobState.SUCCEEDED, now_us=now_us, changes={"failure": None}).job


def _report(attempt: AttemptRecord, *, ok: bool, cancelling: bool) -> bytes:
    """Why the attempt ended; empty where it was cancelled."""
    if cancelling:
        return b""
    if attempt.stop_reason:
        return _fill(job_pb2.FailureReport(reason=attempt.stop_reason), attempt)
    if attempt.failure:
        return _fill(job_pb2.FailureReport.FromString(attempt.failure), attempt)
    text = "the gang ended well, but without a result" if ok else ""
    return _fill(job_pb2.FailureReport(reason=Cause.UNKNOWN.value, message=text), attempt)


def _fill(report: job_pb2.FailureReport, attempt: AttemptRecord) -> bytes:
    filled = job_pb2.FailureReport()
    filled.CopyFrom(report)
    filled.attempt = attempt.epoch
    advice = ADVICE[cause_of(report)]
    filled.reason = filled.reason or Cause.UNKNOWN.value
    filled.message = filled.message or advice.message
    filled.next_step = filled.next_step or advice.next_step
    if not filled.HasField("step") and attempt.last_step:
        filled.step = attempt.last_step
    return filled.SerializeToString()


def cause_of(report: job_pb2.FailureReport) -> Cause:
    """The cause that a report names; UNKNOWN for one that there is not."""
    return Cause(report.reason) if report.reason in Cause.__members__ else Cause.UNKNOWN


@dataclass(frozen=True)
class _Tally:
    """How often the job has failed: in all, of this cause in a row, and at this step in a row."""

    failures: int
    in_row: int
    at_step: int


def _retry_or_fail(
    conn: Connection,
    job: JobRecord,
    attempt: AttemptRecord,
    report: job_pb2.FailureReport,
    *,
    rng: random.Random,
    now_us: int,
) -> JobRecord:
    cause = cause_of(report)
    verdict = VERDICTS[cause]
    progress = attempt.committed > 0
    tally = _count(job, cause, report.step, refilled=_refills(verdict, attempt, progress=progress))
    failure = report.SerializeToString()
    changes = {
        "failures": tally.failures,
        "failures_in_row": tally.in_row,
        "failures_at_step": tally.at_step,
        "failure_cause": cause.value,
        "failure_step": report.step,
    }
    if not _may_retry(job, verdict, tally, cause, progress=progress):
        return jobs.move(conn, job, JobState.FAILED, now_us=now_us, failure=failure, changes=changes).job
    if job.state is not JobState.RECOVERING:
        job = jobs.move(conn, job, JobState.RECOVERING, now_us=now_us, failure=failure).job
    wait_s = verdict.backoff(tally.in_row, rng)
    changes["not_before_us"] = now_us + round(wait_s * 1e6)
    message = f"again in {wait_s:.0f} s" if wait_s >= 1 else "again"
    return jobs.move(conn, job, JobState.QUEUED, now_us=now_us, message=message, changes=changes).job


def _refills(verdict: Verdict, attempt: AttemptRecord, *, progress: bool) -> bool:
    """Whether the attempt has made up for the failures before it: by a checkpoint where the cause is nobody's fault,
    else by an hour that ended with one."""
    return progress and (verdict.retries is None or attempt.end_us - attempt.create_us >= _REFILL_US)


def _count(job: JobRecord, cause: Cause, step: int, *, refilled: bool) -> _Tally:
    same = job.failure_cause == cause.value
    in_row = job.failures_in_row + 1 if same and not refilled else 1
    at_step = job.failures_at_step + 1 if same and step and step == job.failure_step else 1
    return _Tally(job.failures + (cause not in _NOT_COUNTED), in_row, at_step)


def _may_retry(job: JobRecord, verdict: Verdict, tally: _Tally, cause: Cause, *, progress: bool) -> bool:
    spec = spec_pb2.JobSpec.FromString(job.resolved_spec)
    if cause not in _NOT_COUNTED:
        if spec.retry.HasField("max") and tally.failures > spec.retry.max:
            return False
        if tally.at_step >= MAX_FAILURES_AT_STEP:
            return False
    return verdict.may_retry(tally.in_row, made_progress=progress)
