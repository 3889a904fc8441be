"""Indices for lists of 100,000 jobs, for the line of those who wait, and for the attempts that are live."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Labels get what lists are ordered by; each order of a list gets an index."""
    _labels()
    _jobs()
    live = sa.text("state <> 'ENDED'")
    op.create_index("attempt_live", "attempt", ["job_uid", "epoch"], sqlite_where=live, postgresql_where=live)
    op.drop_index("attempt_by_state", "attempt")


def _labels() -> None:
    op.drop_index("label_by_value", "label")
    op.add_column("label", sa.Column("project", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("label", sa.Column("create_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("label", sa.Column("job_row", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.execute(
        "UPDATE label SET "
        "project = (SELECT job.project FROM job WHERE job.uid = label.job_uid), "
        "create_us = (SELECT job.create_us FROM job WHERE job.uid = label.job_uid), "
        "job_row = (SELECT job.id FROM job WHERE job.uid = label.job_uid) "
        "WHERE EXISTS (SELECT 1 FROM job WHERE job.uid = label.job_uid)"
    )
    op.create_index("label_by_value", "label", ["project", "key", "value", "create_us", "job_row"])


def _jobs() -> None:
    # The first stores had `job_by_state`, and no `job_line`.
    for name in ("job_line", "job_by_state", "job_by_create"):
        op.drop_index(name, "job", if_exists=True)
    waits = sa.text("state = 'QUEUED' AND deleted_us = 0")
    line = ["id", "not_before_us", "workers", "gpus_per_worker", "cpus_per_worker", "pending"]
    op.create_index("job_line", "job", [sa.text("priority DESC"), *line], sqlite_where=waits, postgresql_where=waits)
    mine = ["project", "deleted_us"]
    filtered = ["state", "task", "queue", "creator", "priority", "end_us", "display_name"]
    op.create_index("job_by_create", "job", [*mine, "create_us", "id", *filtered])
    op.create_index("job_by_end", "job", [*mine, "end_us", "id"])
    op.create_index("job_by_priority", "job", [*mine, "priority", "id"])
    op.create_index("job_by_display_name", "job", [*mine, "display_name", "id"])
    op.create_index("job_by_state", "job", [*mine, "state", "create_us", "id"])
    deleted = sa.text("deleted_us > 0")
    op.create_index("job_deleted", "job", ["deleted_us"], sqlite_where=deleted, postgresql_where=deleted)
