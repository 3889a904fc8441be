"""Accepts jobs exactly once, even if they are submitted repeatedly or many at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, select
from sqlalchemy.exc import IntegrityError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import CreatedJob, JobRecord, NewJob
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import audit, encode, events, tables
from shardyard_coordinator.store.findable import Findable, insert_findable
from shardyard_coordinator.store.jobs import get_job_by_uid
from shardyard_coordinator.store.resources import live_users, ready_resource
from shardyard_coordinator.store.sql import Prepared, PreparedInsert, in_savepoint

_request = tables.request.c
_CREATED = (
    "uid",
    "project",
    "job_id",
    "display_name",
    "description",
    "queue",
    "priority",
    "task",
    "creator",
    "state",
    "spec",
    "resolved_spec",
    "plan",
    "workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "last_sequence",
    "create_us",
    "update_us",
    "waiting_us",
)
_INSERT_JOB = PreparedInsert(tables.job, _CREATED, returning=("uid", "id"))
_INSERT_REQUEST = PreparedInsert(tables.request, ("principal", "request_id", "fingerprint", "job_uid"))
_INSERT_USE = PreparedInsert(tables.job_use, ("job_uid", "resource"))
_FIND_REQUEST = Prepared(
    select(_request.fingerprint, _request.job_uid).where(
        _request.principal == bindparam("principal"), _request.request_id == bindparam("request_id")
    )
)
_ACCEPTED = encode.state_changed(None, JobState.QUEUED)
_FRESH: Mapping[str, Any] = {
    **dict.fromkeys(("progress", "evaluation", "failure", "pending", "conditions"), b""),
    **dict.fromkeys(("latest_checkpoint", "best_checkpoint", "model", "output_dataset", "failure_cause"), ""),
    **dict.fromkeys(
        (
            "epoch",
            "recomputed_steps",
            "last_step",
            "not_before_us",
            "failures",
            "failures_in_row",
            "failure_step",
            "failures_at_step",
            "start_us",
            "end_us",
            "deleted_us",
        ),
        0,
    ),
    "version": 1,
    "best_value": None,
    "slot_seconds": 0.0,
}


class Submission(NamedTuple):
    """A job to accept, and its submitter."""

    new: NewJob
    actor: Actor


def create_job(conn: Connection, new: NewJob, actor: Actor, now_us: int) -> CreatedJob:
    """Accepts a job: request id, row, labels, event 1 and its plan's warnings, in the caller's transaction.

    The same request of the same principal returns the job that it made. Raises: Refused JOB_EXISTS, REQUEST_ID_REUSED;
    MODEL_NOT_FOUND, DATASET_NOT_FOUND if its model or data was deleted since it was planned.
    """
    if new.request_id:
        found = find_request(conn, actor.principal, new.request_id, new.fingerprint)
        if found is not None:
            return CreatedJob(found, existed=True)
    try:
        [job] = _insert(conn, [Submission(new, actor)], now_us)
    except IntegrityError as error:
        name = f"projects/{new.project}/jobs/{new.job_id}"
        raise Refused(
            Reason.JOB_EXISTS, f"{name} exists; choose another job_id, or leave it out", metadata={"job": name}
        ) from error
    return CreatedJob(job, existed=False)


def create_jobs(conn: Connection, submissions: Sequence[Submission], now_us: int) -> list[CreatedJob | Exception]:
    """Accepts many jobs as `create_job` does, with a few statements if all of them are new."""
    made, _ = in_savepoint(conn, partial(_insert, submissions=submissions, now_us=now_us))
    if made is not None:
        return [CreatedJob(job, existed=False) for job in made]
    outcomes: list[CreatedJob | Exception] = []
    for new, actor in submissions:
        created, error = in_savepoint(conn, partial(create_job, new=new, actor=actor, now_us=now_us))
        outcomes.append(created or error or AssertionError("neither made nor refused"))
    return outcomes


def _insert(conn: Connection, submissions: Sequence[Submission], now_us: int) -> list[JobRecord]:
    """Raises: IntegrityError if a name or a request id is taken; Refused if a model or data set is gone, or if the job
    would change the model of another principal.
    """
    for name in {name for new, _ in submissions for name in new.uses}:
        ready_resource(conn, name)  # It existed when the job was planned, and cannot be deleted from here on.
    for new, actor in submissions:
        if new.adds:
            model = ready_resource(conn, "/".join(new.adds.split("/")[:4]))
            # What an admin may do in the job's project says nothing of the model's.
            strict = actor if model.project == new.project else dataclasses.replace(actor, only_own=True)
            audit.check_owner(model.name, model.creator, strict)
    _check_alone(conn, [new.adds for new, _ in submissions if new.adds])
    requests = [
        {
            "principal": actor.principal,
            "request_id": new.request_id,
            "fingerprint": new.fingerprint,
            "job_uid": new.uid,
        }
        for new, actor in submissions
        if new.request_id
    ]
    _INSERT_REQUEST.run(conn, requests)
    rows = [_row(each, now_us) for each in submissions]
    ids = dict(_INSERT_JOB.run(conn, rows))
    insert_findable(
        conn,
        [Findable(new.uid, ids[new.uid], new.project, now_us, new.labels, new.attributes) for new, _ in submissions],
    )
    uses = [
        {"job_uid": new.uid, "resource": name}
        for new, _ in submissions
        for name in sorted({*new.uses, *([new.adds] if new.adds else [])})
    ]
    _INSERT_USE.run(conn, uses)
    events.insert_logs(conn, [(new.uid, 1, (_ACCEPTED, *new.warnings)) for new, _ in submissions], now_us)
    made = [(actor, f"projects/{new.project}/jobs/{new.job_id}") for new, actor in submissions]
    audit.record_all(conn, made, now_us)
    return [JobRecord(**{**_FRESH, **row, "id": ids[row["uid"]], "state": JobState.QUEUED}) for row in rows]


def _check_alone(conn: Connection, adds: Sequence[str]) -> None:
    """Raises: Refused MODEL_IN_USE if another live job writes the same part of a model."""
    for at, name in enumerate(adds):
        writers = live_users(conn, name) or (["another job"] if name in adds[:at] else [])
        if writers:
            text = f"{writers[0]} writes {name} already; wait for its end, or cancel it"
            raise Refused(Reason.MODEL_IN_USE, text, metadata={"job": writers[0]})


def _row(submission: Submission, now_us: int) -> dict[str, Any]:
    new = submission.new
    return {
        "uid": new.uid,
        "project": new.project,
        "job_id": new.job_id,
        "display_name": new.display_name,
        "description": new.description,
        "queue": new.queue,
        "priority": new.priority,
        "task": new.task,
        "creator": submission.actor.principal,
        "state": JobState.QUEUED.value,
        "spec": new.spec,
        "resolved_spec": new.resolved_spec,
        "plan": new.plan,
        "workers": new.workers,
        "gpus_per_worker": new.gpus_per_worker,
        "cpus_per_worker": new.cpus_per_worker,
        "last_sequence": 1 + len(new.warnings),
        "create_us": now_us,
        "update_us": now_us,
        "waiting_us": now_us,
    }


def find_request(conn: Connection, principal: str, request_id: str, fingerprint: bytes) -> JobRecord | None:
    """The job that the request id has made, or None. Raises: Refused REQUEST_ID_REUSED for another request."""
    row = _FIND_REQUEST.run(conn, principal=principal, request_id=request_id).first()
    if row is None:
        return None
    known, job_uid = row
    job = get_job_by_uid(conn, job_uid)
    if known != fingerprint:
        first = job.name if job is not None else ""
        raise Refused(
            Reason.REQUEST_ID_REUSED,
            f"request_id {request_id} was used for another request, which made {first or 'a job since deleted'}; "
            "make a new one",
            metadata={"first_job": first, "request_id": request_id},
        )
    return job
