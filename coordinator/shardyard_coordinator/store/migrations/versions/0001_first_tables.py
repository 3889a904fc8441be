"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes every table."""
    _attempt()
    _checkpoint()
    _event()
    _job()
    _job_use()
    _label()
    _lease()
    _meta()
    _metric_block()
    _plan()
    _request()
    _resource()
    _resource_file()


def _attempt() -> None:
    op.create_table(
        "attempt",
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("workers", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("slots_per_worker", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("placement", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("nodes", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("cluster_id", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("export_uid", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("high_water", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("resumed_from_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("committed", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failure", sa.LargeBinary(), nullable=True),
        sa.Column("exported", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("stop_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("released", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("end_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("job_uid", "epoch"),
    )
    op.create_index("attempt_by_state", "attempt", ["state"], unique=False)
    op.create_index("attempt_unreleased", "attempt", ["released"], unique=False)


def _checkpoint() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("workers", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("metrics", sa.LargeBinary(), nullable=True),
        sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("job_uid", "epoch", "step"),
    )
    op.create_index("checkpoint_by_state", "checkpoint", ["state"], unique=False)


def _event() -> None:
    op.create_table(
        "event",
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("time_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempt", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("kind", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("position"),
        sa.UniqueConstraint("job_uid", "sequence", name="event_sequence"),
        sqlite_autoincrement=True,
    )


def _job() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("uid", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("display_name", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("description", sa.LargeBinary(), nullable=True),
        sa.Column("queue", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("priority", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("task", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("creator", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("spec", sa.LargeBinary(), nullable=True),
        sa.Column("resolved_spec", sa.LargeBinary(), nullable=True),
        sa.Column("plan", sa.LargeBinary(), nullable=True),
        sa.Column("workers", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("gpus_per_worker", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cpus_per_worker", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("progress", sa.LargeBinary(), nullable=True),
        sa.Column("evaluation", sa.LargeBinary(), nullable=True),
        sa.Column("failure", sa.LargeBinary(), nullable=True),
        sa.Column("pending", sa.LargeBinary(), nullable=True),
        sa.Column("conditions", sa.LargeBinary(), nullable=True),
        sa.Column("latest_checkpoint", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("best_checkpoint", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("best_value", sa.Float(precision=53), nullable=True),
        sa.Column("model", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("output_dataset", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("slot_seconds", sa.Float(precision=53), server_default=sa.text("0"), nullable=False),
        sa.Column("recomputed_steps", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("not_before_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures_in_row", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failure_cause", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("failure_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures_at_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("start_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("end_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("update_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("waiting_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("deleted_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project", "job_id", "deleted_us", name="job_name"),
        sa.UniqueConstraint("uid"),
        sqlite_autoincrement=True,
    )
    op.create_index("job_by_create", "job", ["project", "create_us", "id"], unique=False)
    line = ["state", "deleted_us", "priority", "id", "not_before_us", "pending"]
    op.create_index("job_line", "job", line, unique=False)


def _job_use() -> None:
    op.create_table(
        "job_use",
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job_uid", "resource"),
    )
    op.create_index("job_use_by_resource", "job_use", ["resource"], unique=False)


def _label() -> None:
    op.create_table(
        "label",
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job_uid", "key"),
    )
    op.create_index("label_by_value", "label", ["key", "value"], unique=False)


def _lease() -> None:
    op.create_table(
        "lease",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("term", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("commits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("until_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("holder", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("since_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _meta() -> None:
    op.create_table(
        "meta",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("store_id", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _metric_block() -> None:
    op.create_table(
        "metric_block",
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("first_index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("num_points", sa.BigInteger(), nullable=False),
        sa.Column("min_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_uid", "metric", "first_index"),
    )


def _plan() -> None:
    op.create_table(
        "plan",
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("result", sa.LargeBinary(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint"),
    )


def _request() -> None:
    op.create_table(
        "request",
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("job_uid", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("principal", "request_id"),
    )
    op.create_index("request_by_job", "request", ["job_uid"], unique=False)


def _resource() -> None:
    op.create_table(
        "resource",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("uid", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("resource_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("display_name", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("creator", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("source_job", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("path", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("description", sa.LargeBinary(), nullable=True),
        sa.Column("request_id", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("tombstone", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "project", "resource_id", "tombstone", name="resource_name"),
        sa.UniqueConstraint("uid"),
        sqlite_autoincrement=True,
    )
    op.create_index("resource_by_state", "resource", ["state"], unique=False)


def _resource_file() -> None:
    op.create_table(
        "resource_file",
        sa.Column("resource_uid", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("sha256", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("committed_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("resource_uid", "path"),
    )
