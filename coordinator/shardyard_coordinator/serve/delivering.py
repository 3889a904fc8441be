"""Delivers the events of each webhook: one request at a time, in order, again until it is answered with 2xx.

Its maker has to be allowed to view the project at that moment, whatever it was allowed when it made the webhook.

A webhook is a cursor over the project's log, as a watcher is: a receiver that is slow or dead costs nobody else
anything, and holds nothing in memory. Its place moves in the transaction that records a delivery, so after a crash the
same event is sent again, under the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import LoggedEvent, Place
from shardyard_coordinator.domain.webhooks import DeliveryRecord, WebhookRecord
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve import signing
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.addresses import Addresses
from shardyard_coordinator.serve.fanout import EVERY_JOB, Fanout, webhook_of
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.project_log import ProjectLog
from shardyard_coordinator.serve.receiver import Answer, NotAnswered, Receiver, Timeouts
from shardyard_coordinator.serve.server_info import VERSION
from shardyard_coordinator.serve.signing import Post
from shardyard_coordinator.store import encode, webhooks

_log = logging.getLogger(__name__)
_GONE = 410
_RETRY_S = 5.0
# Events of other kinds that are passed before that is written down.
_MAX_SKIPPED = 500
_AGENT = f"Shardyard/{VERSION}"


@dataclass(frozen=True)
class Patience:
    """Seconds. `first_s` doubles with every failure up to `longest_s`, half of it drawn; `give_up_s` counts only while
    this service runs; `look_s` is how often a clock that is waited for is read."""

    first_s: float = 1.0
    longest_s: float = 300.0
    give_up_s: float = 86_400.0
    look_s: float = 1.0
    quiet_s: float = 60.0


class Deliverer:
    """One task for each webhook that is not disabled. Runs in the coordinator that holds the store, so only once."""

    def __init__(
        self,
        parts: Parts,
        log: ProjectLog,
        fanout: Fanout,
        *,
        access: Access,
        addresses: Addresses,
        timeouts: Timeouts | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.parts = parts
        self.log = log
        self.fanout = fanout
        self._access = access
        self._addresses = addresses
        self._timeouts = timeouts or Timeouts()
        self.patience = patience or Patience()
        self._tls = ssl.create_default_context()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.changed: set[str] = set()
        self._testing: set[str] = set()
        self.rng = random.Random()

    async def start(self) -> None:
        """Begins to deliver for every webhook of the store."""
        self._access.subscribe(self._rights_changed)
        for record in await self.parts.store.read_many(webhooks.list_webhooks):
            if not record.disabled_us:
                self.look_again(record.uid)

    async def close(self) -> None:
        """Stops delivering; an event that is being sent is sent again after the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._addresses.close()

    def look_again(self, uid: str) -> None:
        """A webhook was made or changed: it is read again, and what is due is sent at once."""
        self.changed.add(uid)
        task = self._tasks.get(uid)
        if task is None or task.done():
            self._tasks[uid] = asyncio.create_task(self._run(uid))
        self.fanout.wake(webhook_of(uid))

    def why_not(self, record: WebhookRecord) -> str:
        """Why its maker may not view what would be sent; empty: it may."""
        if record.project not in self.parts.projects:
            return f"projects/{record.project} is not one of this service's any more (--project)"
        return self._access.why_not_view(record.creator, record.maker_groups, record.project)

    def _rights_changed(self) -> None:
        for uid in self._tasks:
            self.fanout.wake(webhook_of(uid))

    async def test(self, record: WebhookRecord) -> DeliveryRecord | None:
        """Sends one request of type `webhook.test`; None if another test of the webhook is being sent."""
        if record.uid in self._testing:
            return None
        self._testing.add(record.uid)
        try:
            post = signing.test_post(self.parts.clock.now_us())
            with contextlib.closing(self._receiver()) as receiver:
                delivery, _ = await self.send(receiver, record, post, attempt=1)
        finally:
            self._testing.discard(record.uid)
        numbered: DeliveryRecord = await self.record(
            partial(webhooks.record_attempt, uid=record.uid, delivery=delivery)
        )
        if delivery.delivered:
            self.look_again(record.uid)
        return numbered

    async def _run(self, uid: str) -> None:
        while True:
            try:
                with contextlib.closing(self._receiver()) as receiver:
                    await _Course(self, uid, receiver).run()
                if uid not in self.changed:
                    del self._tasks[uid]
                    return
            except Refused as refused:  # The store is full or busy; the event is sent again.
                await asyncio.sleep(refused.retry_after_s or _RETRY_S)
            except Exception:  # The edge of a supervised loop: a defect must not end a webhook.
                _log.exception("a webhook's delivery failed; it is begun again")
                await asyncio.sleep(_RETRY_S)

    def _receiver(self) -> Receiver:
        return Receiver(self._addresses, self._tls, self._timeouts)

    async def send(
        self, receiver: Receiver, record: WebhookRecord, post: Post, *, attempt: int
    ) -> tuple[DeliveryRecord, Answer]:
        """One attempt: what became of it, and the answer, which has status 0 if there was none."""
        clock = self.parts.clock
        now_us, begun_s = clock.now_us(), clock.monotonic_s()
        keys = [record.secret, *([record.old_secret] if record.old_until_us > now_us else [])]
        answer, message = Answer(0), ""
        try:
            answer = await receiver.post(record.url, signing.headers_of(post, keys, now_us, agent=_AGENT), post.body)
        except NotAnswered as error:
            message = str(error)
        delivered = 200 <= answer.status < 300
        if answer.status and not delivered:
            message = f"the answer was HTTP {answer.status}"
            if 300 <= answer.status < 400:
                message += "; redirects are not followed: give the URL that they lead to"
        duration_us = round((clock.monotonic_s() - begun_s) * 1e6)
        self.parts.trace.point("webhook.answered")
        made = DeliveryRecord(0, post.id, post.type, attempt, delivered, answer.status, message, now_us, duration_us)
        return made, answer

    async def record(self, operation: Callable[[Connection], Any]) -> Any:
        """Runs an operation of the store as the service itself."""
        return await self.parts.store.write(operation, SYSTEM)


class _Course:
    """The way of one webhook through the log, until it is disabled, deleted, or the service stops."""

    def __init__(self, deliverer: Deliverer, uid: str, receiver: Receiver) -> None:
        self._deliverer = deliverer
        self._parts = deliverer.parts
        self._fanout = deliverer.fanout
        self._patience = deliverer.patience
        self._uid = uid
        self._receiver = receiver
        # Ahead of the row's by events of other kinds, which are not worth a write each.
        self._place = Place(0, 0)
        self._skipped = 0
        self._due_s = 0.0
        self._failed_s: float | None = None

    async def run(self) -> None:
        """Delivers until there is no reason to."""
        keys = (EVERY_JOB, webhook_of(self._uid))
        record = await self._read()
        while record is not None and not record.disabled_us:
            with self._fanout.interest(*keys) as waiter:
                if self._uid in self._deliverer.changed:
                    record = await self._read()
                    continue
                if (why := self._deliverer.why_not(record)) or record.suspended_us:
                    record = await self._suspend(record, why, waiter)
                    continue
                left_s = self._due_s - self._parts.clock.monotonic_s()
                if left_s > 0:
                    await self._wait_out(left_s)
                    continue
                try:
                    batch = await self._deliverer.log.after(record.project, self._place)
                except Refused as refused:
                    record = await self._lose(record, refused)
                    continue
                if batch.place.position == self._place.position:
                    record = await self._rest(record, waiter)
                    continue
            record = await self._deliver(record, batch.events, batch.place)

    async def _read(self) -> WebhookRecord | None:
        """The row as it is now, which a user has changed or this course begins with: nothing is waited for."""
        self._deliverer.changed.discard(self._uid)
        record = await self._parts.store.read(partial(webhooks.find_webhook, uid=self._uid))
        if record is not None:
            self._place, self._skipped, self._due_s = record.place, 0, 0.0
            if not record.failures:
                self._failed_s = None
        return record

    async def _wait_out(self, left_s: float) -> None:
        """Waits out a back-off, unless the webhook is changed; the clock may be one that only tests move."""
        with self._fanout.interest(webhook_of(self._uid)) as waiter:
            await self._fanout.changed(waiter, min(left_s, self._patience.look_s))

    async def _suspend(self, record: WebhookRecord, why: str, waiter: asyncio.Future[None]) -> WebhookRecord | None:
        """Stops while the maker may not view the project, and starts again when it may."""
        if not why:
            self._due_s = 0.0
            _log.warning("%s continues", record.name)
            return await self._deliverer.record(partial(webhooks.resume, record=record)) or await self._read()
        message = f"suspended: {why}; it continues when that changes, or an admin deletes it"
        if not record.suspended_us or record.message != message:
            _log.warning("%s is suspended: %s", record.name, why)
            now_us = self._parts.clock.now_us()
            changed = partial(webhooks.suspend, record=record, message=message, now_us=now_us)
            return await self._deliverer.record(changed) or await self._read()
        self._receiver.close()
        await self._fanout.changed(waiter, self._patience.quiet_s)
        return record

    async def _rest(self, record: WebhookRecord, waiter: asyncio.Future[None]) -> WebhookRecord | None:
        """Nothing is due: waits for an event, and after a while writes down how far it has looked."""
        self._receiver.close()
        if await self._fanout.changed(waiter, self._patience.quiet_s) or not self._skipped:
            return record
        return await self._skip(record)

    async def _lose(self, record: WebhookRecord, refused: Refused) -> WebhookRecord | None:
        """Disables a webhook whose events are gone, which its owner has to know. Raises: another refusal."""
        if refused.reason not in (Reason.CURSOR_EXPIRED, Reason.CURSOR_AHEAD):
            raise refused
        changes = {"disabled_us": self._parts.clock.now_us(), "message": f"disabled: {refused.message}"}
        _log.warning("%s is disabled: %s", record.name, refused.message)
        return (
            await self._deliverer.record(partial(webhooks.disable, record=record, changes=changes))
            or await self._read()
        )

    async def _skip(self, record: WebhookRecord) -> WebhookRecord | None:
        self._skipped = 0
        moved = await self._deliverer.record(partial(webhooks.skip_to, record=record, place=self._place))
        return moved or await self._read()

    async def _deliver(self, record: WebhookRecord, events: list[LoggedEvent], end: Place) -> WebhookRecord | None:
        """Delivers a batch, up to the first failure, or until the webhook is changed."""
        for logged in events:
            if record.kinds and logged.record.kind not in record.kinds:
                self._skipped += 1
                continue
            if self._deliverer.why_not(record):
                return record
            place = Place(logged.record.position, end.removal)
            moved = await self._attempt(record, logged, place)
            if moved is None:
                return await self._read()
            record = moved
            if record.failures:
                return record
            self._place, self._skipped = place, 0
            if self._uid in self._deliverer.changed:
                return record
        self._place, self._skipped = end, self._skipped + 1
        return await self._skip(record) if self._skipped >= _MAX_SKIPPED else record

    async def _attempt(self, record: WebhookRecord, logged: LoggedEvent, place: Place) -> WebhookRecord | None:
        """Sends one event and records what became of it; None if the webhook was changed meanwhile."""
        cursor = self._deliverer.log.cursors.make(record.project, place)
        post = signing.event_post(logged.record.kind, encode.project_event_to_proto(logged, cursor))
        delivery, answer = await self._deliverer.send(self._receiver, record, post, attempt=record.failures + 1)
        if delivery.delivered:
            self._failed_s, self._due_s = None, 0.0
            done = partial(webhooks.record_success, record=record, delivery=delivery, place=place)
            moved: WebhookRecord | None = await self._deliverer.record(done)
            self._parts.trace.point("webhook.delivered")
            return moved
        changes = self._after_failure(record, delivery, answer)
        failed = partial(webhooks.record_failure, record=record, delivery=delivery, changes=changes)
        kept: WebhookRecord | None = await self._deliverer.record(failed)
        return kept

    def _after_failure(self, record: WebhookRecord, delivery: DeliveryRecord, answer: Answer) -> dict[str, Any]:
        """How long to wait, or that nothing is sent any more."""
        patience, clock = self._patience, self._parts.clock
        now_s, now_us = clock.monotonic_s(), clock.now_us()
        since_s = 0.0 if self._failed_s is None else now_s - self._failed_s
        failed_us = record.failed_us + round(since_s * 1e6)
        self._failed_s = now_s
        delay_s = min(patience.first_s * 2 ** min(record.failures, 32), patience.longest_s)
        delay_s = max(
            delay_s * self._deliverer.rng.uniform(0.5, 1.0), min(answer.retry_after_s or 0.0, patience.longest_s)
        )
        self._due_s = now_s + delay_s
        changes: dict[str, Any] = {
            "failures": record.failures + 1,
            "failed_us": failed_us,
            "failing_since_us": record.failing_since_us or now_us,
            "next_attempt_us": now_us + round(delay_s * 1e6),
            "message": delivery.message,
        }
        if answer.status == _GONE or failed_us >= patience.give_up_s * 1e6:
            why = "answered 410 Gone" if answer.status == _GONE else "has failed for a day"
            step = "update it with `disabled` false to continue where it stopped"
            changes["message"] = f"disabled: the receiver {why}; the last time: {delivery.message}; {step}"
            changes["disabled_us"] = now_us
            _log.warning("%s is disabled: the receiver %s", record.name, why)
        return changes
