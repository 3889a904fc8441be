"""A webhook's maker must be allowed to view the project when an event is sent, not only when it made the webhook."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from helpers.core import ACTOR, new_job
from helpers.guarded import Guarded, guarded, metadata
from helpers.receivers import Listening, receiver
from helpers.service import PARENT, Service, serving
from helpers.webhook_calls import HOOK, SENDING, add, emit, until
from shardyard.v1 import auth_service_pb2 as auth
from shardyard.v1 import event_service_pb2
from shardyard.v1 import webhook_service_pb2 as pb
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.store import events, project_log, submissions, tables, webhooks

OPTIONS: dict[str, Any] = {"webhook_allow": ("127.0.0.1",), "sending": SENDING}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path, **OPTIONS) as running:
        running.issuer.add_ec("ec")
        yield running


@pytest.fixture
def listening() -> Iterator[Listening]:
    with receiver() as made:
        yield made


class Story:
    """A job whose events a webhook gets."""

    def __init__(self, service: Guarded, listening: Listening) -> None:
        self.service = service.service
        self.admin = metadata(service.admin)
        self.listening = listening
        self.sent = 0
        self.job: Any = None

    async def begin(self, token: str) -> None:
        """Makes the webhook with a token or JWT, and the job."""
        request = pb.CreateWebhookRequest(parent=PARENT, webhook_id="hook", webhook=pb.Webhook(url=self.listening.url))
        await self.service.webhooks.CreateWebhook(request, metadata=metadata(token))
        new = new_job("story")
        await self.service.store.write(lambda conn: submissions.create_job(conn, new, ACTOR, 1), ACTOR)
        self.job = new
        await self.events_arrive()

    async def more(self) -> None:
        await emit(self.service, self.job, 2)

    async def events_arrive(self) -> None:
        """All events of the job have arrived, each once, in order."""
        await self.more()
        await until(lambda: len(self.listening.accepted) == self.sent + 3)
        self.sent = len(self.listening.accepted) - 1
        page = event_service_pb2.ListEventsRequest(parent=PARENT, page_size=1000)
        found = (await self.service.events.ListEvents(page, metadata=self.admin)).events
        assert self.listening.accepted == [each.event.id for each in found]

    async def is_suspended(self, why: str) -> None:
        """Nothing is sent, and lists say why."""
        webhook = await self.in_state(pb.Webhook.STATE_SUSPENDED)
        assert why in webhook.message and not webhook.disabled
        before = len(self.listening.received)
        await self.more()
        await asyncio.sleep(0.2)
        assert len(self.listening.received) == before
        self.sent += 2

    async def in_state(self, state: int) -> pb.Webhook:
        while True:
            listed = await self.service.webhooks.ListWebhooks(
                pb.ListWebhooksRequest(parent=PARENT), metadata=self.admin
            )
            if listed.webhooks[0].state == state:
                return listed.webhooks[0]
            await asyncio.sleep(0.01)


async def test_a_webhook_stops_with_its_makers_role_and_continues_with_it(
    service: Guarded, listening: Listening
) -> None:
    story = Story(service, listening)
    binding = await service.grant("alice", "submitter")
    await story.begin(await service.token("alice"))
    calls = service.service.auth
    await calls.DeleteRoleBinding(auth.DeleteRoleBindingRequest(name=binding.name), metadata=story.admin)
    await story.is_suspended("alice, who made it, has no role in projects/default any more")
    await service.grant("alice", "submitter", "other")
    await story.is_suspended("no role in projects/default")
    await service.grant("alice", "viewer")
    await story.events_arrive()
    assert (await story.in_state(pb.Webhook.STATE_ACTIVE)).message == ""


async def test_a_webhook_stops_with_its_makers_last_token_and_continues_with_a_new_one(
    service: Guarded, listening: Listening
) -> None:
    story, calls = Story(service, listening), service.service.auth
    first = await service.member("alice", "submitter")
    second = await service.token("alice")
    await story.begin(first)
    for token in (first, second):
        await story.events_arrive()  # One token is enough, whichever it was made with.
        name = f"tokens/{token.split('_')[1]}"
        await calls.RevokeToken(auth.RevokeTokenRequest(name=name), metadata=story.admin)
    await story.is_suspended("alice, who made it, has no valid token for projects/default any more")
    elsewhere = auth.Grant(role=auth.ROLE_VIEWER, project="projects/other")
    await service.token("alice", scopes=[elsewhere])
    await story.is_suspended("no valid token")
    await service.token("alice")
    await story.events_arrive()
    service.service.clock.advance(90 * 86_400 + 1)
    await story.is_suspended("no valid token")
    assert len(listening.accepted) == len(listening.received)


async def test_the_groups_of_a_jwt_count_as_they_were_when_the_webhook_was_made_or_changed(
    service: Guarded, listening: Listening
) -> None:
    def jwt(*groups: str) -> str:
        return service.issuer.token("ec", service.now_s, groups=list(groups))

    story = Story(service, listening)
    binding = await service.grant("group:nlp", "submitter")
    await service.grant("group:vision", "submitter")
    await story.begin(jwt("nlp"))
    service.service.clock.advance(86_400)  # A JWT ends within the hour; that its holder left is the issuer's to say.
    await story.events_arrive()
    gone = auth.DeleteRoleBindingRequest(name=binding.name)
    await service.service.auth.DeleteRoleBinding(gone, metadata=story.admin)
    await story.is_suspended("oidc:alice, who made it, has no role")
    changed = pb.UpdateWebhookRequest(webhook=pb.Webhook(name=HOOK))
    changed.update_mask.paths.append("kinds")
    await service.service.webhooks.UpdateWebhook(changed, metadata=story.admin)
    await story.is_suspended("oidc:alice, who made it, has no role")
    await service.service.webhooks.UpdateWebhook(changed, metadata=metadata(jwt("vision")))
    await story.events_arrive()
    assert (await story.in_state(pb.Webhook.STATE_ACTIVE)).creator == "oidc:alice"


async def test_what_nobody_made_by_name_stops_when_the_service_asks_for_names(
    tmp_path: Path, listening: Listening
) -> None:
    async with serving(tmp_path, **OPTIONS) as open_service:
        await add(open_service, listening.url)
    async with guarded(tmp_path, **OPTIONS) as service:
        story = Story(service, listening)
        webhook = await story.in_state(pb.Webhook.STATE_SUSPENDED)
        assert "nobody answers for it" in webhook.message
        await service.service.webhooks.DeleteWebhook(pb.DeleteWebhookRequest(name=HOOK), metadata=story.admin)


async def test_a_webhook_of_a_project_that_the_operator_has_removed_stops(tmp_path: Path, listening: Listening) -> None:
    async with serving(tmp_path, **OPTIONS) as service:
        await add(service, listening.url)
        moved = update(tables.webhook).values(project="gone")
        await service.store.write(lambda conn: conn.execute(moved).rowcount, SYSTEM)
    async with serving(tmp_path, **OPTIONS) as service:
        while True:
            [record] = await service.store.read_many(webhooks.list_webhooks)
            if record.suspended_us:
                break
            await asyncio.sleep(0.01)
    assert "projects/gone is not one of this service's any more" in record.message


async def test_a_suspended_webhook_keeps_its_events_for_a_week(service: Guarded, listening: Listening) -> None:
    story, running = Story(service, listening), service.service
    binding = await service.grant("alice", "submitter")
    await story.begin(await service.token("alice"))
    gone = auth.DeleteRoleBindingRequest(name=binding.name)
    await running.auth.DeleteRoleBinding(gone, metadata=story.admin)
    await story.is_suspended("no role")
    for days, kept in ((6, True), (2, False)):
        running.clock.advance(days * 86_400)
        await removed(running, story.job.uid)
        left = await running.store.read(lambda conn: events.events_after(conn, story.job.uid, 0, 100))
        assert bool(left) is kept


async def removed(service: Service, job_uid: str) -> None:
    """As the service sweeps."""
    await service.store.write(lambda conn: webhooks.release_old(conn, service.clock.now_us()), SYSTEM)
    await service.store.write(lambda conn: project_log.remove_first(conn, job_uid, 1000), SYSTEM)
