"""Webhooks and their deliveries in the store, alike on both databases."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from helpers.clock import ManualClock
from helpers.core import ACTOR, new_job
from helpers.stores import store_at
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Place
from shardyard_coordinator.domain.webhooks import DeliveryRecord, WebhookRecord
from shardyard_coordinator.seams import SYSTEM, NullTrace
from shardyard_coordinator.store import project_log, submissions, webhooks
from shardyard_coordinator.store.store import Store, open_store

ON_BOTH_STORES = True
KINDS = frozenset({14, 2, 1})
TRIED = DeliveryRecord(0, "event", "job.state", 1, True, 200, "", 5, 10)


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    yield opened
    await opened.close()


def record(number: int, project: str = "default", **fields: Any) -> WebhookRecord:
    values: dict[str, Any] = {each.name: 0 for each in dataclasses.fields(WebhookRecord)}
    values |= {"uid": f"{number:032d}", "project": project, "webhook_id": f"hook-{number}", "url": "https://a/ä"}
    values |= {"kinds": KINDS, "secret": b"\0\xff" * 12, "old_secret": b"", "fingerprint": bytes([number])}
    values |= {"message": "", "creator": "alice", "request_id": f"r-{number}"}
    values |= {"maker_groups": frozenset({"group:ä", "group:b"})}
    return WebhookRecord(**{**values, **fields})


async def create(store: Store, new: WebhookRecord) -> WebhookRecord:
    return await store.write(partial(webhooks.create_webhook, new=new), ACTOR)


async def test_a_webhook_comes_back_as_it_was_made_and_only_once(store: Store) -> None:
    made = [await create(store, record(at, ("a", "b")[at % 2])) for at in range(4)]
    assert made[0] == dataclasses.replace(record(0, "a"), id=made[0].id, version=1)
    assert await create(store, record(0, "a", uid="f" * 32)) == made[0]
    for changes, reason in (({"fingerprint": b"other"}, "REQUEST_ID_REUSED"), ({"request_id": "x"}, "WEBHOOK_EXISTS")):
        with pytest.raises(Refused) as refused:
            await create(store, record(0, "a", **changes))
        assert refused.value.reason.value == reason
    assert await store.read(webhooks.list_webhooks) == made
    page = await store.read(partial(webhooks.list_webhooks, project="b", after_id=made[1].id, limit=5))
    assert page == [made[3]]
    await store.write(partial(webhooks.delete_webhook, record=made[3]), ACTOR)
    again = await create(store, record(3, "b", uid="e" * 32))
    assert again.id > made[3].id, "the row of one that is gone is not used again"


async def test_a_project_has_room_for_so_many_webhooks_and_others_for_theirs(store: Store) -> None:
    for at in range(webhooks.MAX_WEBHOOKS):
        await create(store, record(at))
    with pytest.raises(Refused) as refused:
        await create(store, record(99))
    assert refused.value.reason is Reason.QUOTA_EXCEEDED
    await create(store, record(99, "other"))


async def test_what_was_updated_meanwhile_is_not_moved_by_an_attempt(store: Store) -> None:
    first = await create(store, record(1))
    well = partial(webhooks.record_success, delivery=TRIED)
    moved = await store.write(partial(well, record=first, place=Place(7, 2)), SYSTEM)
    assert moved is not None and (moved.position, moved.removal, moved.last_delivery_us) == (7, 2, 5)
    changes = {"kinds": frozenset({3}), "url": "https://b"}
    updated = await store.write(partial(webhooks.update_webhook, record=moved, changes=changes, now_us=9), ACTOR)
    assert (updated.kinds, updated.version, updated.position) == (frozenset({3}), moved.version + 1, 7)
    assert await store.write(partial(well, record=moved, place=Place(8, 2)), SYSTEM) is None
    failed = partial(webhooks.record_failure, delivery=TRIED, changes={"failures": 1, "message": "away"})
    now = await store.write(partial(failed, record=updated), SYSTEM)
    assert now is not None and (now.failures, now.message, now.position, now.deliveries) == (1, "away", 7, 3)
    await store.write(partial(webhooks.delete_webhook, record=now), ACTOR)
    assert await store.write(partial(well, record=now, place=Place(9, 2)), SYSTEM) is None
    assert await store.read(partial(webhooks.list_deliveries, uid=now.uid, before=None, limit=9)) == []


async def test_the_newest_deliveries_are_kept_with_their_numbers(store: Store) -> None:
    made = await create(store, record(1))
    total = webhooks.MAX_DELIVERIES + 3

    def try_often(conn: Any) -> list[DeliveryRecord]:
        each = [dataclasses.replace(TRIED, attempt=at, delivered=bool(at % 2)) for at in range(total)]
        return [webhooks.record_attempt(conn, made.uid, one) for one in each]

    tried = await store.write(try_often, SYSTEM)
    assert [each.number for each in tried] == list(range(1, total + 1))
    listed = partial(webhooks.list_deliveries, uid=made.uid)
    assert await store.read(partial(listed, before=None, limit=total)) == tried[:2:-1]
    assert await store.read(partial(listed, before=6, limit=total)) == tried[4:2:-1]


async def test_events_that_a_webhook_has_not_delivered_stay_and_those_of_a_removal_are_noted(store: Store) -> None:
    def submit(conn: Any) -> str:
        return submissions.create_job(conn, new_job("job"), ACTOR, 1).job.uid

    def remove(conn: Any) -> int:
        return project_log.remove_first(conn, uid, 10)

    uid = await store.write(submit, ACTOR)
    made = await create(store, record(1))
    [logged] = await store.read(partial(project_log.log_after, position=0, limit=5))
    assert (logged.project, logged.job_id) == ("default", "job")
    before = Place(0, await store.read(partial(project_log.last_removal, project="default")))
    assert await store.write(remove, SYSTEM) == 0, "the webhook is before the event"
    old = dataclasses.replace(made, disabled_us=1)
    await store.write(partial(webhooks.disable, record=made, changes={"disabled_us": old.disabled_us}), SYSTEM)
    await store.write(partial(webhooks.release_old, now_us=webhooks.HOLD_US + 2), SYSTEM)
    assert await store.write(remove, SYSTEM) == 1
    position = logged.record.position
    assert await store.read(project_log.newest_position) == position
    assert not await store.read(partial(project_log.is_kept, project="default", place=before))
    now = Place(0, await store.read(partial(project_log.last_removal, project="default")))
    for place in (now, Place(position, before.removal)):
        assert await store.read(partial(project_log.is_kept, project="default", place=place))
