"""The end of an attempt: what it is called, and whether the job ends with it or is tried again (docs/states.md)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from shardyard.v1 import job_pb2, spec_pb2
from shardyard_coordinator.control.attempt_spec import output_kind
from shardyard_coordinator.domain.advice import ADVICE
from shardyard_coordinator.domain.causes import VERDICTS, Blame, Cause, Verdict
from shardyard_coordinator.domain.records import AttemptRecord, EventKind, JobRecord, ResourceKind
from shardyard_coordinator.domain.states import AttemptState, JobState
from shardyard_coordinator.domain.steps import StaleWrite
from shardyard_coordinator.store import attempts, encode, events, jobs

# Losing the same step again and again is a loop, whatever the budget.
MAX_FAILURES_AT_STEP = 3
_REFILL_US = 3_600_000_000
_NOT_COUNTED = (Cause.PREEMPTED, Cause.DRAINED)
# Signals of a program that went wrong by itself.
_CRASHES = frozenset({"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS"})
# The stop_reason of an attempt that was asked to make a checkpoint and to free its slots.
PAUSE = JobState.PAUSED.value


def lose_attempt(conn: Connection, job_uid: str, epoch: int, failure: job_pb2.FailureReport, now_us: int) -> None:
    """The gang is lost, but not yet confirmed gone: the intention to replace it is recorded before it is killed."""
    job, attempt = _current(conn, job_uid, epoch)
    report = _fill(failure, attempt)
    if attempt.state is not AttemptState.STOPPING:
        changes = {"failure": attempt.failure or report}
        attempt = attempts.move_attempt(conn, job, attempt, AttemptState.STOPPING, now_us=now_us, changes=changes)
    elif attempt.stop_reason == PAUSE and not attempt.failure:
        attempt = attempts.change_attempt(conn, attempt, {"failure": report})
    if job.state in (JobState.PREPARING, JobState.RUNNING, JobState.FINALIZING) and not attempt.exported:
        # A job that is PAUSING or CANCELLING stays so: what it is on its way to does not need the gang.
        message = f"continues {resumes_from(job)}"
        jobs.move(conn, job, JobState.RECOVERING, now_us=now_us, failure=attempt.failure or report, message=message)


def stop_attempt(conn: Connection, job_uid: str, epoch: int, reason: str, now_us: int) -> AttemptRecord:
    """Records that the gang will be stopped, before the directive is sent. Idempotent."""
    job, attempt = _current(conn, job_uid, epoch)
    if attempt.state is AttemptState.STOPPING:
        return attempt
    changes = {"stop_reason": reason}
    return attempts.move_attempt(conn, job, attempt, AttemptState.STOPPING, now_us=now_us, changes=changes)


def end_attempt(
    conn: Connection,
    job_uid: str,
    epoch: int,
    *,
    ok: bool,
    rng: random.Random,
    now_us: int,
    lost: job_pb2.FailureReport | None = None,
) -> JobRecord:
    """Nothing of the gang runs any more: its slots are free, and the job takes its next step.

    `ok`: every rank succeeded. `lost`: the report if a person declared the gang lost.
    Raises: StaleWrite if the attempt had ended already.
    """
    job, attempt = _current(conn, job_uid, epoch)
    report = _fill(lost, attempt) if lost else b"" if attempt.exported else _report(job, attempt, ok=ok)
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
        return jobs.move(conn, job, JobState.CANCELLED, now_us=now_us, message=lost.message if lost else "").job
    if attempt.exported:
        return _succeed(conn, job, ok=ok, now_us=now_us)
    if not report:
        return _pause(conn, job, b"", {}, now_us)
    return _after_failure(conn, job, attempt, job_pb2.FailureReport.FromString(report), rng=rng, now_us=now_us)


def _end_conditions(conn: Connection, job: JobRecord, now_us: int) -> None:
    """Ends all conditions: they were about the gang that has ended."""
    held = job_pb2.Job.FromString(job.conditions).conditions
    over = [job_pb2.Condition(type=each.type, active=False, time=encode.timestamp(now_us)) for each in held]
    drafts = [encode.draft(EventKind.CONDITION, job_pb2.JobEvent(condition=each), job.epoch) for each in over]
    events.append(conn, job.uid, drafts, now_us)


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
    if job.state in (JobState.RUNNING, JobState.PAUSING):
        job = jobs.move(conn, job, JobState.FINALIZING, now_us=now_us).job
    return jobs.move(conn, job, JobState.SUCCEEDED, now_us=now_us, changes={"failure": None}).job


def _report(job: JobRecord, attempt: AttemptRecord, *, ok: bool) -> bytes:
    """Why the attempt ended; empty if a user asked for it."""
    if job.state is JobState.CANCELLING:
        return b""
    if attempt.failure and attempt.stop_reason in ("", PAUSE):
        return _fill(job_pb2.FailureReport.FromString(attempt.failure), attempt)
    if attempt.stop_reason == PAUSE or job.state is JobState.PAUSING:
        return b""
    if attempt.stop_reason:
        return _fill(job_pb2.FailureReport(reason=attempt.stop_reason), attempt)
    text = "the gang succeeded, but left no result" if ok else ""
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
    """The cause that a report names; UNKNOWN if there is no such cause."""
    return Cause(report.reason) if report.reason in Cause.__members__ else Cause.UNKNOWN


@dataclass(frozen=True)
class _Tally:
    """How often the job has failed: in all, of this cause in a row, and at this step in a row."""

    failures: int
    in_row: int
    at_step: int


def _after_failure(
    conn: Connection,
    job: JobRecord,
    attempt: AttemptRecord,
    report: job_pb2.FailureReport,
    *,
    rng: random.Random,
    now_us: int,
) -> JobRecord:
    """Tried again, paused until a person has acted, or failed."""
    cause = cause_of(report)
    verdict = VERDICTS[cause]
    progress = attempt.committed > 0
    tally = _count(job, cause, report.step, refilled=_refills(verdict, attempt, progress=progress))
    changes = {
        "failures": tally.failures,
        "failures_in_row": tally.in_row,
        "failures_at_step": tally.at_step,
        "failure_cause": cause.value,
        "failure_step": report.step,
    }
    may_retry = _may_retry(job, verdict, tally, cause, progress=progress) and not (
        tally.in_row > 1 and not _may_pass(report, verdict) and _is_same(conn, attempt, report)
    )
    if may_retry and (job.state is JobState.PAUSING or attempt.stop_reason == PAUSE):
        report.next_step = f"resume the job (`shardyard resume {job.job_id}`): it continues {resumes_from(job)}"
        return _pause(conn, job, b"" if cause in _NOT_COUNTED else report.SerializeToString(), changes, now_us)
    if may_retry:
        if verdict.may_pass and not verdict.needs_person:
            report.next_step = f"nothing: the job continues {resumes_from(job)}"
        return _retry(conn, job, report, changes, wait_s=verdict.backoff(tally.in_row, rng), now_us=now_us)
    if verdict.needs_person:
        report.next_step = f"{report.next_step}; then resume the job (`shardyard resume {job.job_id}`), or cancel it"
        return _pause(conn, job, report.SerializeToString(), changes, now_us)
    failure = report.SerializeToString()
    return jobs.move(conn, job, JobState.FAILED, now_us=now_us, failure=failure, changes=changes).job


def _retry(
    conn: Connection,
    job: JobRecord,
    report: job_pb2.FailureReport,
    changes: dict[str, Any],
    *,
    wait_s: float,
    now_us: int,
) -> JobRecord:
    where = resumes_from(job)
    failure = report.SerializeToString()
    if job.state is not JobState.RECOVERING:
        message = f"continues {where}"
        job = jobs.move(conn, job, JobState.RECOVERING, now_us=now_us, failure=failure, message=message).job
    message = f"again in {wait_s:.0f} s, {where}" if wait_s >= 1 else f"again, {where}"
    changes = {**changes, "not_before_us": now_us + round(wait_s * 1e6), "failure": failure}
    return jobs.move(conn, job, JobState.QUEUED, now_us=now_us, message=message, changes=changes).job


def _pause(conn: Connection, job: JobRecord, failure: bytes, changes: dict[str, Any], now_us: int) -> JobRecord:
    message = f"a resume continues {resumes_from(job)}"
    return jobs.move(conn, job, JobState.PAUSED, now_us=now_us, failure=failure, message=message, changes=changes).job


def resumes_from(job: JobRecord) -> str:
    """Where the job's next attempt continues, for people."""
    if output_kind(job) is ResourceKind.DATASET:
        return "after the files already made"
    step = job.latest_checkpoint.rpartition("-s")[2]
    return f"from the checkpoint at step {step}" if step else "from the start"


def _refills(verdict: Verdict, attempt: AttemptRecord, *, progress: bool) -> bool:
    """Whether the attempt has made up for the failures before it: by a checkpoint if the cause is not the job's fault,
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
        if tally.at_step >= MAX_FAILURES_AT_STEP and verdict.blame is not Blame.STORAGE:
            return False
    return verdict.may_retry(tally.in_row, made_progress=progress)


def _may_pass(report: job_pb2.FailureReport, verdict: Verdict) -> bool:
    """Whether the next attempt may end otherwise without any change; a process that crashes will crash again."""
    return verdict.may_pass and report.metadata.get("signal", "") not in _CRASHES


def _is_same(conn: Connection, attempt: AttemptRecord, report: job_pb2.FailureReport) -> bool:
    """Whether the attempt before failed at the same step in the same words; numbers in them, as of a process, apart."""
    before = attempts.get_attempt(conn, attempt.job_uid, attempt.epoch - 1)
    if before is None or not before.failure:
        return False
    previous = job_pb2.FailureReport.FromString(before.failure)
    return (previous.reason, previous.step, _words(previous)) == (report.reason, report.step, _words(report))


def _words(report: job_pb2.FailureReport) -> str:
    return re.sub(r"\b0x[0-9a-f]+|\d+", "#", report.message)
