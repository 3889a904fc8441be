"""Webhooks with their deliveries, what was removed of the event log, and annotations and links that filters find."""

import hashlib
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_AT_ONCE = 500
_ANNOTATIONS, _EXTERNAL_URI = 6, 7
# No filter names a longer one, and PostgreSQL indexes no text of over 2,704 bytes.
_MAX_KEY = 256


def upgrade() -> None:
    """Makes the tables; the annotations and links of every job that was not deleted become rows."""
    _webhooks()
    op.create_table(
        "event_removal",
        sa.Column("project", sa.Text(), primary_key=True),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        _number("up_to"),
    )
    op.create_table(
        "attribute",
        sa.Column("job_uid", sa.Text(), primary_key=True),
        sa.Column("field", sa.Text(), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        _number("digest"),
        _number("job_row"),
    )
    op.create_index("attribute_by_field", "attribute", ["project", "field", "digest", "job_row"])
    _fill()


def _webhooks() -> None:
    identity = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "webhook",
        sa.Column("id", identity, primary_key=True, autoincrement=True),
        sa.Column("uid", sa.Text(), nullable=False, unique=True),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("webhook_id", sa.Text(), nullable=False),
        _number("version", 1),
        _text("url"),
        _text("kinds"),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("old_secret", sa.LargeBinary(), nullable=True),
        _number("old_until_us"),
        _number("position"),
        _number("removal"),
        _number("disabled_us"),
        _number("holds", 1),
        _text("message"),
        _number("failures"),
        _number("failed_us"),
        _number("failing_since_us"),
        _number("next_attempt_us"),
        _number("last_delivery_us"),
        _number("deliveries"),
        _text("creator"),
        _text("request_id"),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=True),
        _number("create_us"),
        _number("update_us"),
        sa.UniqueConstraint("project", "webhook_id", name="webhook_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "delivery",
        sa.Column("webhook_uid", sa.Text(), primary_key=True),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        _text("event_id"),
        _text("type"),
        _number("attempt"),
        _number("delivered"),
        _number("status"),
        _text("message"),
        _number("time_us"),
        _number("duration_us"),
    )


def _number(name: str, default: int = 0) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default=sa.text(str(default)))


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=False, server_default=sa.text("''"))


def _fill() -> None:
    connection = op.get_bind()
    job = sa.table("job", *(sa.column(name) for name in ("id", "uid", "project", "description", "deleted_us")))
    names = ("job_uid", "field", "value", "project", "digest", "job_row")
    attribute = sa.table("attribute", *(sa.column(name) for name in names))
    last = 0
    while rows := connection.execute(sa.select(job).where(job.c.id > last).order_by(job.c.id).limit(_AT_ONCE)).all():
        made = [
            {
                "job_uid": row.uid,
                "field": field,
                "value": value,
                "project": row.project,
                "digest": int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], signed=True),
                "job_row": row.id,
            }
            for row in rows
            if not row.deleted_us
            for field, value in _attributes(bytes(row.description or b"")).items()
        ]
        if made:
            connection.execute(sa.insert(attribute), made)
        last = rows[-1].id


def _attributes(description: bytes) -> dict[str, str]:
    """The fields of filters in a stored Job, read without the generated code, which knows the newest form only."""
    found: dict[str, str] = {}
    for number, value in _texts(description):
        if number == _EXTERNAL_URI and value:
            found["external_uri"] = value.decode("utf-8", "replace")
        elif number == _ANNOTATIONS:
            entry = {number: text.decode("utf-8", "replace") for number, text in _texts(value)}
            key = entry.get(1, "")
            if len(key) <= _MAX_KEY:
                found[f"annotations.{key}"] = entry.get(2, "")
    return found


def _texts(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field with a length; a description has no others."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 != 2:
            return
        length, at = _varint(message, at)
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            break
    return value, at
