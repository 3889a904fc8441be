"""The tables (docs/reliability.md): values to filter, order or decide by have columns, all else is protobuf bytes.

Times are BIGINT microseconds UTC, 0 if unset; all types exist in PostgreSQL too.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from shardyard_coordinator.store.columns import IDENTITY, bytes_column, number_column, text_column

metadata = MetaData()


meta = Table(
    "meta",
    metadata,
    Column("id", BigInteger(), primary_key=True, autoincrement=False),
    Column("store_id", Text(), nullable=False),
    Column("secret", LargeBinary(), nullable=False),
    number_column("create_us"),
)

lease = Table(
    "lease",
    metadata,
    Column("id", BigInteger(), primary_key=True, autoincrement=False),
    number_column("term"),
    number_column("commits"),
    number_column("until_us"),
    text_column("holder"),
    number_column("since_us"),
)

job = Table(
    "job",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("uid", Text(), nullable=False, unique=True),
    Column("project", Text(), nullable=False),
    Column("job_id", Text(), nullable=False),
    number_column("version", 1),
    text_column("display_name"),
    bytes_column("description"),
    text_column("queue"),
    number_column("priority"),
    text_column("task"),
    text_column("creator"),
    Column("state", Text(), nullable=False),
    bytes_column("spec"),
    bytes_column("resolved_spec"),
    bytes_column("plan"),
    number_column("workers", 1),
    number_column("gpus_per_worker"),
    number_column("cpus_per_worker", 1),
    number_column("epoch"),
    number_column("last_sequence"),
    bytes_column("progress"),
    bytes_column("evaluation"),
    bytes_column("failure"),
    bytes_column("pending"),
    bytes_column("conditions"),
    text_column("latest_checkpoint"),
    text_column("best_checkpoint"),
    Column("best_value", Float(53), nullable=True),
    text_column("model"),
    text_column("output_dataset"),
    Column("slot_seconds", Float(53), nullable=False, server_default=text("0")),
    number_column("recomputed_steps"),
    number_column("last_step"),
    number_column("not_before_us"),
    number_column("failures"),
    number_column("failures_in_row"),
    text_column("failure_cause"),
    number_column("failure_step"),
    number_column("failures_at_step"),
    number_column("create_us"),
    number_column("start_us"),
    number_column("end_us"),
    number_column("update_us"),
    number_column("waiting_us"),
    number_column("deleted_us"),
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
    text_column("project"),
    number_column("create_us"),
    number_column("job_row"),
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
    number_column("digest"),
    number_column("job_row"),
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
    Column("position", IDENTITY, primary_key=True, autoincrement=True),
    Column("job_uid", Text(), nullable=False),
    Column("sequence", BigInteger(), nullable=False),
    number_column("time_us"),
    number_column("attempt"),
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
    number_column("up_to"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("job_uid", Text(), primary_key=True),
    Column("epoch", BigInteger(), primary_key=True, autoincrement=False),
    Column("state", Text(), nullable=False),
    number_column("workers", 1),
    number_column("slots_per_worker", 1),
    text_column("placement"),
    text_column("nodes"),
    text_column("cluster_id"),
    text_column("export_uid"),
    number_column("high_water"),
    number_column("resumed_from_step"),
    number_column("last_step"),
    number_column("committed"),
    bytes_column("failure"),
    number_column("exported"),
    text_column("stop_reason"),
    number_column("released"),
    number_column("create_us"),
    number_column("end_us"),
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
    text_column("path"),
    number_column("size_bytes"),
    number_column("workers", 1),
    bytes_column("metrics"),
    number_column("create_us"),
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
    number_column("min_step"),
    number_column("max_step"),
    Column("data", LargeBinary(), nullable=False),
)

resource = Table(
    "resource",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("uid", Text(), nullable=False, unique=True),
    Column("kind", Text(), nullable=False),
    Column("project", Text(), nullable=False),
    Column("resource_id", Text(), nullable=False),
    Column("state", Text(), nullable=False),
    text_column("display_name"),
    text_column("creator"),
    text_column("source_job"),
    text_column("path"),
    number_column("size_bytes"),
    bytes_column("description"),
    text_column("request_id"),
    number_column("create_us"),
    # The uid while DELETING, so that the name is free at once.
    text_column("tombstone"),
    UniqueConstraint("kind", "project", "resource_id", "tombstone", name="resource_name"),
    Index("resource_by_state", "state"),
    sqlite_autoincrement=True,
)

resource_file = Table(
    "resource_file",
    metadata,
    Column("resource_uid", Text(), primary_key=True),
    Column("path", Text(), primary_key=True),
    number_column("size_bytes"),
    text_column("sha256"),
    number_column("committed_bytes"),
)

plan = Table(
    "plan",
    metadata,
    Column("fingerprint", LargeBinary(), primary_key=True),
    Column("result", LargeBinary(), nullable=False),
    number_column("create_us"),
)

webhook = Table(
    "webhook",
    metadata,
    Column("id", IDENTITY, primary_key=True, autoincrement=True),
    Column("uid", Text(), nullable=False, unique=True),
    Column("project", Text(), nullable=False),
    Column("webhook_id", Text(), nullable=False),
    number_column("version", 1),
    text_column("url"),
    text_column("kinds"),
    Column("secret", LargeBinary(), nullable=False),
    bytes_column("old_secret"),
    number_column("old_until_us"),
    # Everything of the project up to this position was delivered; `removal` is the last removal before that was true.
    number_column("position"),
    number_column("removal"),
    number_column("disabled_us"),
    # 1: events after its position are not removed.
    number_column("holds", 1),
    text_column("message"),
    number_column("failures"),
    # How long it has been failing while this service ran.
    number_column("failed_us"),
    number_column("failing_since_us"),
    number_column("next_attempt_us"),
    number_column("last_delivery_us"),
    number_column("deliveries"),
    text_column("creator"),
    text_column("request_id"),
    bytes_column("fingerprint"),
    number_column("create_us"),
    number_column("update_us"),
    # The groups of its maker when it made or last changed it, as JSON.
    text_column("maker_groups"),
    # Since when its maker may not view the project.
    number_column("suspended_us"),
    UniqueConstraint("project", "webhook_id", name="webhook_name"),
    sqlite_autoincrement=True,
)

delivery = Table(
    "delivery",
    metadata,
    Column("webhook_uid", Text(), primary_key=True),
    Column("number", BigInteger(), primary_key=True, autoincrement=False),
    text_column("event_id"),
    text_column("type"),
    number_column("attempt"),
    number_column("delivered"),
    number_column("status"),
    text_column("message"),
    number_column("time_us"),
    number_column("duration_us"),
)

token = Table(
    "token",
    metadata,
    Column("row", IDENTITY, primary_key=True, autoincrement=True),
    Column("id", Text(), nullable=False, unique=True),
    Column("principal", Text(), nullable=False),
    Column("sha256", LargeBinary(), nullable=False),
    text_column("display_name"),
    text_column("scopes"),
    text_column("creator"),
    number_column("create_us"),
    number_column("expire_us"),
    number_column("revoke_us"),
    sqlite_autoincrement=True,
)

role_binding = Table(
    "role_binding",
    metadata,
    Column("project", Text(), primary_key=True),
    Column("id", Text(), primary_key=True),
    Column("member", Text(), nullable=False),
    Column("role", Text(), nullable=False),
    text_column("creator"),
    number_column("create_us"),
)

# Rows are only ever added. The project is empty for what concerns all of them.
audit = Table(
    "audit",
    metadata,
    Column("position", IDENTITY, primary_key=True, autoincrement=True),
    number_column("time_us"),
    text_column("principal"),
    text_column("credential"),
    Column("method", Text(), nullable=False),
    text_column("project"),
    text_column("resource"),
    text_column("request_id"),
    Column("outcome", Text(), nullable=False),
    text_column("peer"),
    number_column("count", 1),
    Index("audit_by_project", "project", "position"),
    sqlite_autoincrement=True,
)
