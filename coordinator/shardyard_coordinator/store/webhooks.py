"""Operations on webhooks: their rows, the place up to which each has delivered, and its newest deliveries.

A place moves only with what was delivered, in the transaction that records the delivery, and only if nobody has updated
the webhook since: so an update always wins over an attempt that was made meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import Place
from shardyard_coordinator.domain.webhooks import DeliveryRecord, WebhookRecord
from shardyard_coordinator.seams import Actor
from shardyard_coordinator.store import audit, tables
from shardyard_coordinator.store.jobs import ANY_ETAG
from shardyard_coordinator.store.sql import Prepared, PreparedInsert, PreparedUpdate

_webhook, _delivery = tables.webhook.c, tables.delivery.c
_FIELDS = tuple(field.name for field in dataclasses.fields(WebhookRecord))
_COLUMNS = tuple(_webhook[name] for name in _FIELDS)
_DELIVERY_FIELDS = tuple(field.name for field in dataclasses.fields(DeliveryRecord))
_BY_UID = Prepared(select(*_COLUMNS).where(_webhook.uid == bindparam("uid")))
_MOVE = PreparedUpdate(
    tables.webhook, _webhook.uid == bindparam("webhook"), _webhook.version == bindparam("seen"), returning=_COLUMNS
)
_NUMBER = Prepared(
    update(tables.webhook)
    .where(_webhook.uid == bindparam("webhook"))
    .values(deliveries=_webhook.deliveries + 1)
    .returning(_webhook.deliveries)
)
_ADD_DELIVERY = PreparedInsert(tables.delivery, ("webhook_uid", *_DELIVERY_FIELDS))
_FORGET = Prepared(
    delete(tables.delivery).where(_delivery.webhook_uid == bindparam("webhook"), _delivery.number <= bindparam("up_to"))
)
MAX_WEBHOOKS = 20
"""Of one project."""
MAX_DELIVERIES = 200
HOLD_US = 7 * 86_400_000_000
"""For so long a disabled or suspended webhook keeps the events that it has not delivered from being removed."""
_WELL: Mapping[str, Any] = {
    "failures": 0,
    "failed_us": 0,
    "failing_since_us": 0,
    "next_attempt_us": 0,
    "message": "",
    "suspended_us": 0,
}


def create_webhook(conn: Connection, new: WebhookRecord) -> WebhookRecord:
    """Adds a webhook; `id` and `version` of `new` are not used. The same request id returns the webhook that it made.

    Raises: Refused WEBHOOK_EXISTS, REQUEST_ID_REUSED, QUOTA_EXCEEDED.
    """
    held = _find(conn, new.project, new.webhook_id)
    if held is not None:
        return _made_before(held, new)
    count = conn.execute(select(func.count()).where(_webhook.project == new.project)).scalar_one()
    if count >= MAX_WEBHOOKS:
        text = f"projects/{new.project} has {count} webhooks, the most allowed; delete one, or use one for more kinds"
        raise Refused(Reason.QUOTA_EXCEEDED, text, metadata={"limit": str(MAX_WEBHOOKS)})
    values = {name: getattr(new, name) for name in _FIELDS if name not in ("id", "version")}
    conn.execute(insert(tables.webhook).values(_written(values)))
    return require_webhook(conn, new.uid)


def _made_before(held: WebhookRecord, new: WebhookRecord) -> WebhookRecord:
    if new.request_id and (held.request_id, held.creator) == (new.request_id, new.creator):
        if held.fingerprint == new.fingerprint:
            return held
        text = f"request_id {new.request_id} was used for another request, which made {held.name}; make a new one"
        raise Refused(Reason.REQUEST_ID_REUSED, text, metadata={"request_id": new.request_id})
    text = f"{held.name} exists; choose another webhook_id, or update it"
    raise Refused(Reason.WEBHOOK_EXISTS, text, metadata={"webhook": held.name})


def get_webhook(conn: Connection, project: str, webhook_id: str) -> WebhookRecord:
    """The webhook of that name. Raises: Refused WEBHOOK_NOT_FOUND."""
    found = _find(conn, project, webhook_id)
    if found is None:
        name = f"projects/{project}/webhooks/{webhook_id}"
        text = f"there is no webhook `{name}`; list them with `shardyard webhooks list` (ListWebhooks)"
        raise Refused(Reason.WEBHOOK_NOT_FOUND, text, metadata={"webhook": name})
    return found


def own_webhook(conn: Connection, project: str, webhook_id: str, actor: Actor) -> WebhookRecord:
    """The webhook of that name, for its change. Raises: Refused WEBHOOK_NOT_FOUND, ACCESS_DENIED (another one's)."""
    record = get_webhook(conn, project, webhook_id)
    audit.check_owner(record.name, record.creator, actor)
    return record


def find_webhook(conn: Connection, uid: str) -> WebhookRecord | None:
    """The webhook of that uid; None if it was deleted."""
    row = _BY_UID.run(conn, uid=uid).first()
    return None if row is None else _from_row(row)


def require_webhook(conn: Connection, uid: str) -> WebhookRecord:
    """The webhook of that uid, which exists."""
    found = find_webhook(conn, uid)
    assert found is not None
    return found


def list_webhooks(
    conn: Connection, project: str | None = None, *, after_id: int = 0, limit: int = -1
) -> list[WebhookRecord]:
    """The webhooks of a project, or of all, in the order in which they were made; `limit` -1: all of them."""
    statement = select(*_COLUMNS).where(_webhook.id > after_id).order_by(_webhook.id)
    if project is not None:
        statement = statement.where(_webhook.project == project)
    return [_from_row(row) for row in conn.execute(statement if limit < 0 else statement.limit(limit))]


def update_webhook(conn: Connection, record: WebhookRecord, changes: Mapping[str, Any], now_us: int) -> WebhookRecord:
    """Changes columns of a webhook as a user wants it; it then tries at once, and its failures count from zero.

    `record` is the row as it was read in this transaction.
    """
    values = {**_WELL, **changes, "version": record.version + 1, "update_us": now_us}
    conn.execute(update(tables.webhook).where(_webhook.uid == record.uid).values(_written(values)))
    return require_webhook(conn, record.uid)


def delete_webhook(conn: Connection, record: WebhookRecord) -> None:
    """Removes a webhook and its deliveries."""
    conn.execute(delete(tables.delivery).where(_delivery.webhook_uid == record.uid))
    conn.execute(delete(tables.webhook).where(_webhook.uid == record.uid))


def check_etag(record: WebhookRecord, etag: str) -> None:
    """Raises: Refused ETAG_MISMATCH unless `etag` is the webhook's, empty or `*`."""
    if etag not in (*ANY_ETAG, record.etag):
        text = f"{record.name} has changed: its etag is {record.etag}, not {etag[:64]!r}; read it again"
        raise Refused(Reason.ETAG_MISMATCH, text, metadata={"webhook": record.name, "etag": record.etag})


def skip_to(conn: Connection, record: WebhookRecord, place: Place) -> WebhookRecord | None:
    """Moves past events that are not of the webhook's kinds; None if it was updated or deleted meanwhile."""
    return _moved(conn, record, {"position": place.position, "removal": place.removal})


def disable(conn: Connection, record: WebhookRecord, changes: Mapping[str, Any]) -> WebhookRecord | None:
    """The service stops sending; `changes` say why. None if the webhook was updated or deleted meanwhile."""
    return _moved(conn, record, changes)


def suspend(conn: Connection, record: WebhookRecord, message: str, now_us: int) -> WebhookRecord | None:
    """Nothing is sent from now on. None if the webhook was updated or deleted meanwhile."""
    return _moved(conn, record, {"suspended_us": record.suspended_us or now_us, "message": message})


def resume(conn: Connection, record: WebhookRecord) -> WebhookRecord | None:
    """Events are sent again from where it stopped. None if the webhook was updated or deleted meanwhile."""
    return _moved(conn, record, {**_WELL, "holds": 1})


def record_success(
    conn: Connection, record: WebhookRecord, delivery: DeliveryRecord, place: Place
) -> WebhookRecord | None:
    """An event was delivered: the place moves past it. None if the webhook was updated or deleted meanwhile."""
    record_attempt(conn, record.uid, delivery)
    moved = {**_WELL, "position": place.position, "removal": place.removal, "last_delivery_us": delivery.time_us}
    return _moved(conn, record, moved)


def record_failure(
    conn: Connection, record: WebhookRecord, delivery: DeliveryRecord, changes: Mapping[str, Any]
) -> WebhookRecord | None:
    """An attempt failed: the place stays. None if the webhook was updated or deleted meanwhile."""
    record_attempt(conn, record.uid, delivery)
    return _moved(conn, record, changes)


def record_attempt(conn: Connection, uid: str, delivery: DeliveryRecord) -> DeliveryRecord:
    """Adds an attempt to the list, which keeps the newest ones; returns it with its number. The place stays."""
    row = _NUMBER.run(conn, webhook=uid).first()
    numbered = dataclasses.replace(delivery, number=row[0] if row is not None else 0)
    if row is not None:
        values = {**dataclasses.asdict(numbered), "webhook_uid": uid, "delivered": int(delivery.delivered)}
        _ADD_DELIVERY.run(conn, [values])
        _FORGET.run(conn, webhook=uid, up_to=numbered.number - MAX_DELIVERIES)
    return numbered


def _moved(conn: Connection, record: WebhookRecord, changes: Mapping[str, Any]) -> WebhookRecord | None:
    row = _MOVE.run(conn, changes, webhook=record.uid, seen=record.version).first()
    return None if row is None else _from_row(row)


def list_deliveries(conn: Connection, uid: str, *, before: int | None, limit: int) -> list[DeliveryRecord]:
    """The attempts of a webhook, the newest first."""
    columns = (_delivery[name] for name in _DELIVERY_FIELDS)
    statement = select(*columns).where(_delivery.webhook_uid == uid).order_by(_delivery.number.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_delivery.number < before)
    found = [DeliveryRecord(*row) for row in conn.execute(statement)]
    return [dataclasses.replace(each, delivered=bool(each.delivered)) for each in found]


def release_old(conn: Connection, now_us: int) -> None:
    """Lets the events go that webhooks have kept which were disabled or suspended long ago."""
    for since_us in (_webhook.disabled_us, _webhook.suspended_us):
        old = (since_us > 0, since_us < now_us - HOLD_US, _webhook.holds == 1)
        conn.execute(update(tables.webhook).where(*old).values(holds=0))


def _find(conn: Connection, project: str, webhook_id: str) -> WebhookRecord | None:
    statement = select(*_COLUMNS).where(_webhook.project == project, _webhook.webhook_id == webhook_id)
    row = conn.execute(statement).first()
    return None if row is None else _from_row(row)


def _from_row(row: Row[Any] | tuple[Any, ...]) -> WebhookRecord:
    values = dict(zip(_FIELDS, row, strict=True))
    values["kinds"] = frozenset(int(each) for each in values["kinds"].split(",") if each)
    values["maker_groups"] = frozenset(json.loads(values["maker_groups"] or "[]"))
    for name in ("old_secret", "fingerprint"):
        values[name] = values[name] or b""
    return WebhookRecord(**values)


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a record as the columns take them."""
    found = dict(values)
    if "kinds" in found:
        found["kinds"] = ",".join(map(str, sorted(found["kinds"])))
    if "maker_groups" in found:
        found["maker_groups"] = json.dumps(sorted(found["maker_groups"]))
    return found
