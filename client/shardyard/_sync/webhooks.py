# Made from the async source by client/generate_sync.py: change that, never this.
"""Webhooks of the service, and a project's events as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shardyard._convert import read, read_project_event
from shardyard._messages import build, build_duration
from shardyard._names import last_part
from shardyard._requests import event_kinds
from shardyard._sync import runtime
from shardyard._sync.connection import Connection
from shardyard._sync.resources import pages
from shardyard.errors import DataLoss
from shardyard.types import Delivery, ProjectEvent, WebhookInfo
from shardyard.v1 import event_service_pb2, webhook_service_pb2

_SEND_S = 60.0
_MOST_GAPS = 5


class Webhook:
    """A webhook of the service: each event of the project as a signed POST to its URL."""

    def __init__(self, connection: Connection, message: webhook_service_pb2.Webhook) -> None:
        self._connection = connection
        self.message = message

    def __repr__(self) -> str:
        return f"<Webhook {self.name} {self.info.state}>"

    @property
    def name(self) -> str:
        """`projects/{project}/webhooks/{webhook}`."""
        return self.message.name

    @property
    def id(self) -> str:
        """The last part of the name."""
        return last_part(self.message.name)

    @property
    def secret(self) -> str:
        """The key of the signatures, right after it was made; empty for a webhook that was read."""
        return self.message.secret

    @property
    def info(self) -> WebhookInfo:
        """The webhook as it was read last."""
        return read(WebhookInfo, self.message)

    def refresh(self) -> WebhookInfo:
        """Reads the webhook again and updates `info`."""
        request = webhook_service_pb2.GetWebhookRequest(name=self.name)
        self.message = self._connection.call(self._connection.webhooks.GetWebhook, request)
        return self.info

    def update(
        self,
        *,
        url: str | None = None,
        kinds: Sequence[str] | None = None,
        disabled: bool | None = None,
        cursor: str | None = None,
    ) -> WebhookInfo:
        """Change what is given. `disabled=False` begins again where it stopped; `cursor` delivers again, or skips.

        Raises: InvalidArgument ADDRESS_NOT_ALLOWED; OutOfRange CURSOR_EXPIRED if events after the cursor are gone.
        """
        wanted = None if kinds is None else event_kinds(kinds)
        given = {"url": url, "kinds": wanted, "disabled": disabled, "cursor": cursor}
        changed = {field: value for field, value in given.items() if value is not None}
        request = webhook_service_pb2.UpdateWebhookRequest()
        request.webhook.CopyFrom(build(webhook_service_pb2.Webhook, "webhook", name=self.name, **changed))
        request.update_mask.paths.extend(changed)
        self.message = self._connection.call(self._connection.webhooks.UpdateWebhook, request)
        return self.info

    def rotate_secret(self) -> str:
        """Make a new secret and return it; for a day each request is signed with the old one too."""
        request = webhook_service_pb2.RotateWebhookSecretRequest(name=self.name)
        self.message = self._connection.call(self._connection.webhooks.RotateWebhookSecret, request)
        return self.secret

    def test(self) -> Delivery:
        """Send one request of type `webhook.test` now; what became of it."""
        request = webhook_service_pb2.TestWebhookRequest(name=self.name)
        answer = self._connection.call(self._connection.webhooks.TestWebhook, request, timeout=_SEND_S)
        return read(Delivery, answer)

    def deliveries(self) -> Iterator[Delivery]:
        """The attempts, the newest first; the newest 200 are kept."""
        request = webhook_service_pb2.ListDeliveriesRequest(parent=self.name)
        method = self._connection.webhooks.ListDeliveries
        for message in pages(self._connection, method, request, "deliveries"):
            yield read(Delivery, message)

    def delete(self) -> None:
        """Delete the webhook; nothing is sent any more."""
        request = webhook_service_pb2.DeleteWebhookRequest(name=self.name)
        self._connection.call(self._connection.webhooks.DeleteWebhook, request)


def follow_project(
    connection: Connection, *, after: str, from_now: bool, kinds: Sequence[str], min_interval: float | None
) -> Iterator[ProjectEvent]:
    """Every event of the project after a cursor, each exactly once; never ends by itself.

    Raises: RequestError; DataLoss EVENT_GAP.
    """
    wanted = event_kinds(kinds)
    interval = None if min_interval is None else build_duration("min_interval", min_interval)
    cursor, gaps = after, 0

    def request() -> event_service_pb2.WatchEventsRequest:
        return build(
            event_service_pb2.WatchEventsRequest,
            parent=connection.parent,
            after_cursor=cursor,
            from_now=from_now and not cursor,
            kinds=wanted,
            min_interval=interval,
        )

    while gaps <= _MOST_GAPS:
        with runtime.closing(connection.streaming(connection.events.WatchEvents, request)) as stream:
            for batch in stream:
                if cursor and batch.after_cursor != cursor:
                    break
                for message in batch.events:
                    event: Any = read_project_event(message)
                    cursor, gaps = event.cursor, 0
                    yield event
                cursor = batch.cursor or cursor
        gaps += 1
    raise DataLoss(f"{connection.parent}: events after {cursor} do not arrive", reason="EVENT_GAP")
