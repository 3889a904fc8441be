"""Calls about webhooks of a service in this process, and what they lead to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from helpers.service import PARENT, Service, create
from shardyard.v1 import job_pb2
from shardyard.v1 import webhook_service_pb2 as pb
from shardyard_coordinator.domain.records import EventKind
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.app import Sending
from shardyard_coordinator.serve.delivering import Patience
from shardyard_coordinator.serve.receiver import Timeouts
from shardyard_coordinator.store import encode, events

HOOK = f"{PARENT}/webhooks/hook"
PATIENT = Timeouts(connect_s=30.0, answer_s=30.0, body_s=0.1)
SENDING = Sending(timeouts=PATIENT, patience=Patience(look_s=0.005, quiet_s=0.05))


async def submit(service: Service, job_id: str = "story") -> job_pb2.Job:
    """A job that waits: nothing runs here."""
    request = create(job_id)
    request.job.spec.train_data.dataset = f"{PARENT}/datasets/corpus"
    return await service.jobs.CreateJob(request)


async def emit(service: Service, job: job_pb2.Job, count: int) -> None:
    """Adds so many events to a job's log."""
    drafts = [
        encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=step, loss=float("nan"))), 1)
        for step in range(count)
    ]
    await service.store.write(lambda conn: events.append(conn, job.uid, drafts, service.clock.now_us()), SYSTEM)


async def add(service: Service, url: str, webhook_id: str = "hook", **fields: Any) -> pb.Webhook:
    """Creates a webhook."""
    webhook = pb.Webhook(url=url, **fields)
    request = pb.CreateWebhookRequest(parent=PARENT, webhook_id=webhook_id, webhook=webhook)
    return await service.webhooks.CreateWebhook(request)


async def get(service: Service, name: str = HOOK) -> pb.Webhook:
    """A webhook as the service describes it."""
    return await service.webhooks.GetWebhook(pb.GetWebhookRequest(name=name))


async def change(service: Service, *paths: str, **fields: Any) -> pb.Webhook:
    """Updates fields of the webhook: those named, else those given."""
    request = pb.UpdateWebhookRequest(webhook=pb.Webhook(name=HOOK, **fields))
    request.update_mask.paths.extend(paths or fields)
    return await service.webhooks.UpdateWebhook(request)


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits until something holds; the clock of the tests does not move meanwhile."""
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.005)


async def until_state(service: Service, state: int) -> None:
    """Waits until the webhook is in a state."""
    while (await get(service)).state != state:
        await asyncio.sleep(0.01)
