"""Batches and webhooks: rules that the protos cannot express."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from shardyard.v1 import event_service_pb2 as events
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import webhook_service_pb2 as webhooks
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.serve.addresses import parse_url
from shardyard_coordinator.serve.validation import updates
from shardyard_coordinator.serve.validation.names import name_complaint
from shardyard_coordinator.serve.validation.text import control_complaint, id_complaint, request_id_complaint, show

Found = list[FieldViolation]


def check_batch_create(
    request: jobs.BatchCreateJobsRequest,
    found: Found,
    check_one: Callable[[jobs.CreateJobRequest, Found], None],
) -> None:
    """The rules of each request, under its index; ids are not used twice, and all are tried or none."""
    ids: dict[tuple[str, str], int] = {}
    for at, each in enumerate(request.requests):
        own: Found = []
        check_one(each, own)
        if each.parent not in ("", request.parent):
            text = f"{show(each.parent)} is not the batch's parent {show(request.parent)}; leave it out"
            own.append(FieldViolation("parent", text))
        if each.validate_only != request.requests[0].validate_only:
            text = "differs from that of requests[0]; set it for all of the batch, or for none"
            own.append(FieldViolation("validate_only", text))
        for field in ("job_id", "request_id"):
            value = getattr(each, field).lower()
            before = ids.setdefault((field, value), at) if value else at
            if before != at:
                text = f"{show(value)} is that of requests[{before}] too; give each its own"
                own.append(FieldViolation(field, text))
        found += [dataclasses.replace(one, field=f"requests[{at}].{one.field}") for one in own]


def check_batch_cancel(request: jobs.BatchCancelJobsRequest, found: Found) -> None:
    """Names of jobs of the parent's project, each once."""
    seen: dict[str, int] = {}
    for at, name in enumerate(request.names):
        complaint = name_complaint("job", name)
        if complaint is None and not name.startswith(f"{request.parent}/jobs/"):
            complaint = f"{show(name)} is not a job of {show(request.parent)}; cancel it in a batch of its own project"
        if complaint is None and seen.setdefault(name, at) != at:
            complaint = f"duplicate name {show(name)}, that of names[{seen[name]}]; leave one out"
        if complaint is not None:
            found.append(FieldViolation(f"names[{at}]", complaint))


def check_watch_events(request: events.WatchEventsRequest, found: Found) -> None:
    """A cursor and `from_now` say different things."""
    if request.from_now and request.after_cursor:
        found.append(FieldViolation("from_now", "is set beside after_cursor; give one of them"))


def check_create_webhook(request: webhooks.CreateWebhookRequest, found: Found) -> None:
    """The id, the request id and the URL."""
    if complaint := id_complaint(request.webhook_id):
        found.append(FieldViolation("webhook_id", complaint))
    if complaint := request_id_complaint(request.request_id, required=False):
        found.append(FieldViolation("request_id", complaint))
    if request.HasField("webhook"):
        _check_url(request.webhook, found)


def check_update_webhook(request: webhooks.UpdateWebhookRequest, found: Found) -> None:
    """The mask, and the fields that it names."""
    found += updates.webhook_mask(request)
    if request.HasField("webhook") and "url" in request.update_mask.paths:
        _check_url(request.webhook, found)


def _check_url(webhook: Any, found: Found) -> None:
    if not webhook.url:
        found.append(FieldViolation("webhook.url", "is missing; give a URL such as `https://example.org/hook`"))
        return
    complaint = control_complaint(webhook.url)
    if complaint is None:
        try:
            parse_url(webhook.url)
        except ValueError as error:
            complaint = f"{show(webhook.url)} is not allowed: {error}; give one such as `https://example.org/hook`"
    if complaint is not None:
        found.append(FieldViolation("webhook.url", complaint))
