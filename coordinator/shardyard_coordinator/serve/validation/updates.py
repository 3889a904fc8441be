"""Updates: which fields may change, and what a mask says."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.message import Message

from shardyard.v1 import job_pb2
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import webhook_service_pb2 as webhooks
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.validation.text import show

MAPS: Final = ("labels", "annotations")
ALWAYS: Final = ("display_name", *MAPS, "external_uri")
"""These change at any time; those of LIVE until the job has ended."""
LIVE: Final = ("queue", "priority", "spec.retry.max", "spec.max_run_time", "spec.checkpoints.keep_last")
JOB_FIELDS: Final = (*ALWAYS, *LIVE)
WEBHOOK_FIELDS: Final = ("url", "kinds", "disabled", "cursor")
MAX_PATHS: Final = 100
# A job that was read and is sent back has these; they are not meant to change.
_IGNORED: Final = ("name", "etag")

Found = list[FieldViolation]


def narrow_job(request: jobs.UpdateJobRequest, output_only: Sequence[str]) -> Found:
    """Leaves only the masked fields in the request's job, and names each in its mask; returns the mask's violations.

    Without a mask the fields that are set are meant, all of which must be such that may change.
    """
    for name in output_only:
        if name not in _IGNORED:
            request.job.ClearField(name)  # type: ignore[arg-type]
    paths = list(request.update_mask.paths)
    if paths == ["*"]:
        paths = list(JOB_FIELDS)
    if not paths:
        paths = _set_fields(request.job)
        wrong = [path for path in paths if path not in JOB_FIELDS]
        if wrong:
            shown = ", ".join(f"`{path}`" for path in wrong)
            text = f"{shown} cannot be changed; name the fields to change in update_mask: of {', '.join(JOB_FIELDS)}"
            return [FieldViolation("update_mask", text, Reason.FIELD_IMMUTABLE)]
    found = _complaints(paths, JOB_FIELDS, job_pb2.Job)
    if found:
        return found
    if not paths:
        return [FieldViolation("update_mask", f"nothing is to be changed; name fields of {', '.join(JOB_FIELDS)}")]
    narrowed = job_pb2.Job(name=request.job.name, etag=request.job.etag)
    for path in paths:
        _copy(request.job, narrowed, path)
    request.job.CopyFrom(narrowed)
    del request.update_mask.paths[:]
    request.update_mask.paths.extend(dict.fromkeys(paths))
    return []


def webhook_mask(request: webhooks.UpdateWebhookRequest) -> Found:
    """The violations of the mask. A cursor that was read with the webhook must not move it, so a mask is required."""
    if not request.update_mask.paths:
        return [FieldViolation("update_mask", f"is missing; name the fields to change: of {', '.join(WEBHOOK_FIELDS)}")]
    return _complaints(request.update_mask.paths, WEBHOOK_FIELDS, webhooks.Webhook)


def key_of(path: str) -> tuple[str, str] | None:
    """The map and the key of a path such as `labels.team`; None for another path."""
    owner, dot, key = path.partition(".")
    return (owner, key.strip("`")) if dot and owner in MAPS and key.strip("`") else None


def _complaints(paths: Sequence[str], allowed: Sequence[str], kind: type[Message]) -> Found:
    if len(paths) > MAX_PATHS:
        return [FieldViolation("update_mask", f"{len(paths)} paths; at most {MAX_PATHS} are allowed; send fewer")]
    found: Found = []
    for at, path in enumerate(paths):
        if path in allowed or ("labels" in allowed and key_of(path)):
            continue
        if path.partition(".")[0] in kind.DESCRIPTOR.fields_by_name:
            text = f"{show(path)} cannot be changed; of {', '.join(allowed)} can"
            found.append(FieldViolation(f"update_mask.paths[{at}]", text, Reason.FIELD_IMMUTABLE))
            continue
        near = difflib.get_close_matches(path, allowed, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(allowed)}"
        found.append(FieldViolation(f"update_mask.paths[{at}]", f"there is no field {show(path)}; {hint}"))
    return found


def _set_fields(job: job_pb2.Job) -> list[str]:
    """The paths of the fields that are set, as deep as the paths that may change."""
    return [path for path in _paths(job, "") if path not in _IGNORED]


def _paths(message: Message, prefix: str) -> list[str]:
    found: list[str] = []
    for field, value in message.ListFields():
        path = prefix + field.name
        if path not in JOB_FIELDS and any(each.startswith(f"{path}.") for each in JOB_FIELDS):
            found += _paths(value, f"{path}.")
        else:
            found.append(path)
    return found


def _copy(source: Any, target: Any, path: str) -> None:
    """Copies one field, if it is set."""
    pair = key_of(path)
    if pair is not None:
        owner, key = pair
        if key in getattr(source, owner):
            getattr(target, owner)[key] = getattr(source, owner)[key]
        return
    *above, last = path.split(".")
    for name in above:
        if not source.HasField(name):
            return
        source, target = getattr(source, name), getattr(target, name)
    if any(field.name == last for field, _ in source.ListFields()):
        if last in MAPS:
            getattr(target, last).MergeFrom(getattr(source, last))
        elif hasattr(getattr(source, last), "DESCRIPTOR"):
            getattr(target, last).CopyFrom(getattr(source, last))
        else:
            setattr(target, last, getattr(source, last))
