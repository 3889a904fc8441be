"""The tables (docs/reliability.md): values to filter, order or decide by have columns, all else is protobuf bytes.

Times are BIGINT microseconds UTC, 0 if unset; all types exist in PostgreSQL too.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

# SQLite numbers rows by itself only if the key's type is exactly INTEGER.
_Identity = BigInteger().with_variant(Integer(), "sqlite")


def _number(name: str, default: int = 0) -> Column[int]:
    return Column(name, BigInteger(), nullable=False, server_default=text(str(default)))


def _text(name: str) -> Column[str]:
    return Column(name, Text(), nullable=False, server_default=text("''"))


def _bytes(name: str) -> Column[bytes]:
    # An empty literal that both databases read as bytes does not exist, so an unset value is NULL.
    return Column(name, LargeBinary(), nullable=True)


meta = Table(
    "meta",
    metadata,
    Column("id", BigInteger(), primary_key=True, autoincrement=False),
    Column("store_id", Text(), nullable=False),
    Column("secret", LargeBinary(), nullable=False),
    _number("create_us"),
)

lease = Table(
    "lease",
    metadata,
    Column("id", BigInteger(), primary_key=True, autoincrement=False),
    _number("term"),
    _number("commits"),
    _number("until_us"),
    _text("holder"),
    _number("since_us"),
)

job = Table(
    "job",
    metadata,
    Column("id", _Identity, primary_key=True, autoincrement=True),
    Column("uid", Text(), nullable=False, unique=True),
    Column("project", Text(), nullable=False),
    Column("job_id", Text(), nullable=False),
    _number("version", 1),
    _text("display_name"),
    _bytes("description"),
    _text("queue"),
    _number("priority"),
    _text("task"),
    _text("creator"),
    Column("state", Text(), nullable=False),
    _bytes("spec"),
    _bytes("resolved_spec"),
    _bytes("plan"),
    _number("workers", 1),
    _number("gpus_per_worker"),
    _number("cpus_per_worker", 1),
    _number("epoch"),
    _number("last_sequence"),
    _bytes("progress"),
    _bytes("evaluation"),
    _bytes("failure"),
    _bytes("pending"),
    _bytes("conditions"),
    _text("latest_checkpoint"),
    _text("best_checkpoint"),
    Column("best_value", Float(53), nullable=True),
    _text("model"),
    _text("output_dataset"),
    Column("slot_seconds", Float(53), nullable=False, server_default=text("0")),
    _number("recomputed_steps"),
    _number("last_step"),
    _number("not_before_us"),
    _number("failures"),
    _number("failures_in_row"),
    _text("failure_cause"),
    _number("failure_step"),
    _number("failures_at_step"),
    _number("create_us"),
    _number("start_us"),
    _number("end_us"),
    _number("update_us"),
    _number("waiting_us"),
    _number("deleted_us"),
    UniqueConstraint("project", "job_id", "deleted_us", name="job_name"),
    sqlite_autoincrement=True,
)
# Everything that a scheduling pass reads of waiting jobs: only they are in it, in the order of the line.
_waits = text("state = 'QUEUED' AND deleted_us = 0")
Index(
    "job_line",
    job.c.priority.desc(),
    job.c.id,
    job.c.not_before_us,
    job.c.workers,
    job.c.gpus_per_worker,
    job.c.cpus_per_worker,
    job.c.pending,
    sqlite_where=_waits,
    postgresql_where=_waits,
)
# One per order of lists. The first one also has the fields of filters: rows with their specs are long, and a filter
# that few jobs meet would otherwise read all of them.
Index(
    "job_by_create",
    *(job.c[name] for name in ("project", "deleted_us", "create_us", "id")),
    *(job.c[name] for name in ("state", "task", "queue", "creator", "priority", "end_us", "display_name")),
)
Index("job_by_end", job.c.project, job.c.deleted_us, job.c.end_us, job.c.id)
Index("job_by_priority", job.c.project, job.c.deleted_us, job.c.priority, job.c.id)
Index("job_by_display_name", job.c.project, job.c.deleted_us, job.c.display_name, job.c.id)
Index("job_by_state", job.c.project, job.c.deleted_us, job.c.state, job.c.create_us, job.c.id)
_deleted = text("deleted_us > 0")
Index("job_deleted", job.c.deleted_us, sqlite_where=_deleted, postgresql_where=_deleted)

request = Table(
    "request",
    metadata,
    Column("principal", Text(), primary_key=True),
    Column("request_id", Text(), primary_key=True),
    Column("fingerprint", LargeBinary(), nullable=False),
    Column("job_uid", Text(), nullable=False),
    Index("request_by_job", "job_uid"),
)

label = Table(
    "label",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("key", Text(), primary_key=True),
    Column("value", Text(), nullable=False),
    # For lists of jobs by a label; a job's project and its time of creation never change.
    _text("project"),
    _number("create_us"),
    _number("job_row"),
    Index("label_by_value", "project", "key", "value", "create_us", "job_row"),
)

# What filters find in a job's description: its external_uri, and annotations. Values may be too long for an index, so
# they are found by a digest.
attribute = Table(
    "attribute",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("field", Text(), primary_key=True),
    Column("value", Text(), nullable=False),
    Column("project", Text(), nullable=False),
    _number("digest"),
    _number("job_row"),
    Index("attribute_by_field", "project", "field", "digest", "job_row"),
)

job_use = Table(
    "job_use",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("resource", Text(), primary_key=True),
    Index("job_use_by_resource", "resource"),
)

event = Table(
    "event",
    metadata,
    Column("position", _Identity, primary_key=True, autoincrement=True),
    Column("job_uid", Text(), nullable=False),
    Column("sequence", BigInteger(), nullable=False),
    _number("time_us"),
    _number("attempt"),
    Column("kind", BigInteger(), nullable=False),
    Column("payload", LargeBinary(), nullable=False),
    UniqueConstraint("job_uid", "sequence", name="event_sequence"),
    sqlite_autoincrement=True,
)

# The part of a project's log that is gone: up to which position a removal went, numbered in their order. Only those
# that no later one exceeds are kept, and the last one.
event_removal = Table(
    "event_removal",
    metadata,
    Column("project", Text(), primary_key=True),
    Column("number", BigInteger(), primary_key=True, autoincrement=False),
    _number("up_to"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("epoch", BigInteger(), primary_key=True, autoincrement=False),
    Column("state", Text(), nullable=False),
    _number("workers", 1),
    _number("slots_per_worker", 1),
    _text("placement"),
    _text("nodes"),
    _text("cluster_id"),
    _text("export_uid"),
    _number("high_water"),
    _number("resumed_from_step"),
    _number("last_step"),
    _number("committed"),
    _bytes("failure"),
    _number("exported"),
    _text("stop_reason"),
    _number("released"),
    _number("create_us"),
    _number("end_us"),
    Index("attempt_unreleased", "released"),
)
# Attempts that hold slots are read all the time, and are few among all attempts.
_live = text("state <> 'ENDED'")
Index("attempt_live", attempt.c.job_uid, attempt.c.epoch, sqlite_where=_live, postgresql_where=_live)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("epoch", BigInteger(), primary_key=True, autoincrement=False),
    Column("step", BigInteger(), primary_key=True, autoincrement=False),
    Column("state", Text(), nullable=False),
    _text("path"),
    _number("size_bytes"),
    _number("workers", 1),
    _bytes("metrics"),
    _number("create_us"),
    Index("checkpoint_by_state", "state"),
)

metric_block = Table(
    "metric_block",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("metric", Text(), primary_key=True),
    # The number of points of the metric before the block, over all attempts: the cursor of WatchMetrics.
    Column("first_index", BigInteger(), primary_key=True, autoincrement=False),
    Column("attempt", BigInteger(), nullable=False),
    Column("num_points", BigInteger(), nullable=False),
    _number("min_step"),
    _number("max_step"),
    Column("data", LargeBinary(), nullable=False),
)

resource = Table(
    "resource",
    metadata,
    Column("id", _Identity, primary_key=True, autoincrement=True),
    Column("uid", Text(), nullable=False, unique=True),
    Column("kind", Text(), nullable=False),
    Column("project", Text(), nullable=False),
    Column("resource_id", Text(), nullable=False),
    Column("state", Text(), nullable=False),
    _text("display_name"),
    _text("creator"),
    _text("source_job"),
    _text("path"),
    _number("size_bytes"),
    _bytes("description"),
    _text("request_id"),
    _number("create_us"),
    # The uid while DELETING, so that the name is free at once.
    _text("tombstone"),
    UniqueConstraint("kind", "project", "resource_id", "tombstone", name="resource_name"),
    Index("resource_by_state", "state"),
    sqlite_autoincrement=True,
)

resource_file = Table(
    "resource_file",
    metadata,
    Column("resource_uid", Text(), primary_key=True),
    Column("path", Text(), primary_key=True),
    _number("size_bytes"),
    _text("sha256"),
    _number("committed_bytes"),
)

plan = Table(
    "plan",
    metadata,
    Column("fingerprint", LargeBinary(), primary_key=True),
    Column("result", LargeBinary(), nullable=False),
    _number("create_us"),
)

webhook = Table(
    "webhook",
    metadata,
    Column("id", _Identity, primary_key=True, autoincrement=True),
    Column("uid", Text(), nullable=False, unique=True),
    Column("project", Text(), nullable=False),
    Column("webhook_id", Text(), nullable=False),
    _number("version", 1),
    _text("url"),
    _text("kinds"),
    Column("secret", LargeBinary(), nullable=False),
    _bytes("old_secret"),
    _number("old_until_us"),
    # Everything of the project up to this position was delivered; `removal` is the last removal before that was true.
    _number("position"),
    _number("removal"),
    _number("disabled_us"),
    # 1: events after its position are not removed.
    _number("holds", 1),
    _text("message"),
    _number("failures"),
    # How long it has been failing while this service ran.
    _number("failed_us"),
    _number("failing_since_us"),
    _number("next_attempt_us"),
    _number("last_delivery_us"),
    _number("deliveries"),
    _text("creator"),
    _text("request_id"),
    _bytes("fingerprint"),
    _number("create_us"),
    _number("update_us"),
    UniqueConstraint("project", "webhook_id", name="webhook_name"),
    sqlite_autoincrement=True,
)

delivery = Table(
    "delivery",
    metadata,
    Column("webhook_uid", Text(), primary_key=True),
    Column("number", BigInteger(), primary_key=True, autoincrement=False),
    _text("event_id"),
    _text("type"),
    _number("attempt"),
    _number("delivered"),
    _number("status"),
    _text("message"),
    _number("time_us"),
    _number("duration_us"),
)

token = Table(
    "token",
    metadata,
    Column("row", _Identity, primary_key=True, autoincrement=True),
    Column("id", Text(), nullable=False, unique=True),
    Column("principal", Text(), nullable=False),
    Column("sha256", LargeBinary(), nullable=False),
    _text("display_name"),
    _text("scopes"),
    _text("creator"),
    _number("create_us"),
    _number("expire_us"),
    _number("revoke_us"),
    sqlite_autoincrement=True,
)

role_binding = Table(
    "role_binding",
    metadata,
    Column("project", Text(), primary_key=True),
    Column("id", Text(), primary_key=True),
    Column("member", Text(), nullable=False),
    Column("role", Text(), nullable=False),
    _text("creator"),
    _number("create_us"),
)

# Rows are only ever added. The project is empty for what concerns all of them.
audit = Table(
    "audit",
    metadata,
    Column("position", _Identity, primary_key=True, autoincrement=True),
    _number("time_us"),
    _text("principal"),
    _text("credential"),
    Column("method", Text(), nullable=False),
    _text("project"),
    _text("resource"),
    _text("request_id"),
    Column("outcome", Text(), nullable=False),
    _text("peer"),
    _number("count", 1),
    Index("audit_by_project", "project", "position"),
    sqlite_autoincrement=True,
)
