"""WebhookService: where the events of a project are sent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from google.protobuf import empty_pb2
from sqlalchemy import Connection

from shardyard.v1 import webhook_service_pb2 as pb
from shardyard_coordinator.domain.access import Caller
from shardyard_coordinator.domain.errors import FieldViolation, Refused, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Place
from shardyard_coordinator.domain.webhooks import DeliveryRecord, WebhookRecord
from shardyard_coordinator.serve import signing
from shardyard_coordinator.serve.addresses import Addresses, AddressRefused, parse_url
from shardyard_coordinator.serve.call import Behaviour, Call
from shardyard_coordinator.serve.delivering import Deliverer
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.project_log import Cursors, newest_place
from shardyard_coordinator.serve.submit import make_uid
from shardyard_coordinator.serve.tokens import Pages
from shardyard_coordinator.store import audit, encode, webhooks

# An old secret signs beside the new one for so long.
_ROTATION_US = 86_400_000_000
_LOOK_UP_S = 5.0
_BY_OWNER = "disabled by its owner"


class WebhookService:
    """Each event of a project as a signed HTTP POST."""

    full_name = "shardyard.v1.WebhookService"

    def __init__(self, parts: Parts, cursors: Cursors, deliverer: Deliverer, addresses: Addresses) -> None:
        self._parts = parts
        self._cursors = cursors
        self._deliverer = deliverer
        self._addresses = addresses

    def behaviours(self) -> Mapping[str, Behaviour]:
        """The behaviour of each method, by name."""
        return {
            "CreateWebhook": self.create,
            "GetWebhook": self.get,
            "ListWebhooks": self.list,
            "UpdateWebhook": self.update,
            "DeleteWebhook": self.delete,
            "RotateWebhookSecret": self.rotate,
            "TestWebhook": self.test,
            "ListDeliveries": self.list_deliveries,
        }

    async def create(self, request: pb.CreateWebhookRequest, call: Call) -> pb.Webhook:
        """Adds the webhook and begins to deliver; the answer has its secret."""
        project = self._parts.name("project", request.parent).project
        wanted = request.webhook
        request.request_id = request.request_id.lower()  # One UUID, however it is written.
        await self._check_url(wanted.url)
        given = self._cursors.read(project, wanted.cursor, "webhook.cursor") if wanted.cursor else None
        now_us = self._parts.clock.now_us()

        def operation(conn: Connection) -> WebhookRecord:
            place = newest_place(conn, project)
            if given is not None:
                place = self._cursors.require_kept(conn, project, given, "webhook.cursor")
            new = _new(request, project, call.caller, place, now_us)
            made = webhooks.create_webhook(conn, new)
            if made.uid == new.uid:  # Else an earlier try has made it.
                audit.record(conn, call.actor, made.name, now_us)
            return made

        record = await self._parts.store.write(operation, call.actor)
        self._deliverer.look_again(record.uid)
        return self._with_secret(record)

    async def get(self, request: pb.GetWebhookRequest, _call: Call) -> pb.Webhook:
        """Returns one webhook, without its secret."""
        return self._shown(await self._read(request.name))

    async def list(self, request: pb.ListWebhooksRequest, _call: Call) -> pb.ListWebhooksResponse:
        """Lists a page of webhooks, the oldest first."""
        project = self._parts.name("project", request.parent).project
        pages = Pages(self._parts.tokens, "webhooks", request)
        after_id = pages.after() or 0
        found = await self._parts.store.read_many(
            lambda conn: webhooks.list_webhooks(conn, project, after_id=after_id, limit=pages.size + 1)
        )
        page, token = pages.fill(found, self._shown, lambda record: record.id)
        return pb.ListWebhooksResponse(webhooks=page, next_page_token=token)

    async def update(self, request: pb.UpdateWebhookRequest, call: Call) -> pb.Webhook:
        """Changes the fields of the mask; the webhook then tries at once."""
        wanted, fields = request.webhook, frozenset(request.update_mask.paths)
        name = self._parts.name("webhook", wanted.name)
        if "url" in fields:
            await self._check_url(wanted.url)
        given: Place | None = None
        if "cursor" in fields:
            given = self._cursors.read(name.project, wanted.cursor, "webhook.cursor")
        now_us = self._parts.clock.now_us()

        def operation(conn: Connection) -> WebhookRecord:
            record = webhooks.own_webhook(conn, name.project, name.id, call.actor)
            webhooks.check_etag(record, wanted.etag)
            changes: dict[str, Any] = {}
            if call.principal == record.creator:
                changes["maker_groups"] = call.caller.groups
            if "url" in fields:
                changes["url"] = wanted.url
            if "kinds" in fields:
                changes["kinds"] = _kinds(wanted)
            if record.disabled_us:
                changes["message"] = record.message
            if "disabled" in fields:
                message = _BY_OWNER if wanted.disabled else ""
                changes |= {"disabled_us": now_us if wanted.disabled else 0, "holds": 1, "message": message}
            if given is not None or ("disabled" in fields and not wanted.disabled):
                place = self._cursors.require_kept(conn, name.project, given or record.place, "webhook.cursor")
                changes |= {"position": place.position, "removal": place.removal}
            audit.record(conn, call.actor, record.name, now_us)
            return webhooks.update_webhook(conn, record, changes, now_us)

        record = await self._parts.store.write(operation, call.actor)
        self._deliverer.look_again(record.uid)
        return self._shown(record)

    async def delete(self, request: pb.DeleteWebhookRequest, call: Call) -> empty_pb2.Empty:
        """Removes the webhook and its deliveries."""
        name, now_us = self._parts.name("webhook", request.name), self._parts.clock.now_us()

        def operation(conn: Connection) -> str:
            record = webhooks.own_webhook(conn, name.project, name.id, call.actor)
            webhooks.check_etag(record, request.etag)
            webhooks.delete_webhook(conn, record)
            audit.record(conn, call.actor, record.name, now_us)
            return record.uid

        self._deliverer.look_again(await self._parts.store.write(operation, call.actor))
        return empty_pb2.Empty()

    async def rotate(self, request: pb.RotateWebhookSecretRequest, call: Call) -> pb.Webhook:
        """Makes a new secret, which the answer has; the old one signs beside it for a day."""
        name, now_us = self._parts.name("webhook", request.name), self._parts.clock.now_us()
        secret = signing.make_secret()

        def operation(conn: Connection) -> WebhookRecord:
            record = webhooks.own_webhook(conn, name.project, name.id, call.actor)
            webhooks.check_etag(record, request.etag)
            audit.record(conn, call.actor, record.name, now_us)
            changes = {"secret": secret, "old_secret": record.secret, "old_until_us": now_us + _ROTATION_US}
            return webhooks.update_webhook(conn, record, changes, now_us)

        record = await self._parts.store.write(operation, call.actor)
        self._deliverer.look_again(record.uid)
        return self._with_secret(record)

    async def test(self, request: pb.TestWebhookRequest, call: Call) -> pb.Delivery:
        """Sends a request of type `webhook.test`, and returns what became of it."""
        record = await self._read(request.name)
        audit.check_owner(record.name, record.creator, call.actor)
        delivery = await self._deliverer.test(record)
        if delivery is None:
            text = f"a test of {record.name} is being sent; wait for its end"
            raise Refused(Reason.OVERLOADED, text, retry_after_s=1.0)
        return encode.delivery_to_proto(delivery)

    async def list_deliveries(self, request: pb.ListDeliveriesRequest, _call: Call) -> pb.ListDeliveriesResponse:
        """Lists a page of the newest attempts, the newest first."""
        name = self._parts.name("webhook", request.parent)
        pages = Pages(self._parts.tokens, "deliveries", request)
        before = pages.after()

        def query(conn: Connection) -> list[DeliveryRecord]:
            record = webhooks.get_webhook(conn, name.project, name.id)
            return webhooks.list_deliveries(conn, record.uid, before=before, limit=pages.size + 1)

        found = await self._parts.store.read_many(query)
        page, token = pages.fill(found, encode.delivery_to_proto, lambda each: each.number)
        return pb.ListDeliveriesResponse(deliveries=page, next_page_token=token)

    async def _read(self, name: str) -> WebhookRecord:
        parsed = self._parts.name("webhook", name)
        return await self._parts.store.read(partial(webhooks.get_webhook, project=parsed.project, webhook_id=parsed.id))

    async def _check_url(self, url: str) -> None:
        """Refused ADDRESS_NOT_ALLOWED if the host leads where it may not. One that has no address yet may get one."""
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                await self._addresses.of(parse_url(url))
        except AddressRefused as refused:
            raise refused_fields([FieldViolation("webhook.url", str(refused), Reason.ADDRESS_NOT_ALLOWED)]) from None
        except (OSError, ValueError):  # Checked again before each connection, and shown in `message` then.
            return

    def _shown(self, record: WebhookRecord) -> pb.Webhook:
        return encode.webhook_to_proto(record, self._cursors.make(record.project, record.place))

    def _with_secret(self, record: WebhookRecord) -> pb.Webhook:
        webhook = self._shown(record)
        webhook.secret = signing.shown_secret(record.secret)
        return webhook


def _new(request: pb.CreateWebhookRequest, project: str, maker: Caller, place: Place, now_us: int) -> WebhookRecord:
    wanted = request.webhook
    digest = hashlib.sha256(wanted.SerializeToString(deterministic=True)).digest()
    return WebhookRecord(
        id=0,
        uid=make_uid(now_us),
        project=project,
        webhook_id=request.webhook_id,
        version=1,
        url=wanted.url,
        kinds=_kinds(wanted),
        secret=signing.make_secret(),
        old_secret=b"",
        old_until_us=0,
        position=place.position,
        removal=place.removal,
        disabled_us=now_us if wanted.disabled else 0,
        message=_BY_OWNER if wanted.disabled else "",
        failures=0,
        failed_us=0,
        failing_since_us=0,
        next_attempt_us=0,
        last_delivery_us=0,
        deliveries=0,
        creator=maker.principal,
        request_id=request.request_id,
        fingerprint=digest,
        create_us=now_us,
        update_us=now_us,
        maker_groups=maker.groups,
        suspended_us=0,
    )


def _kinds(webhook: pb.Webhook) -> frozenset[int]:
    return frozenset(int(kind) for kind in webhook.kinds)
