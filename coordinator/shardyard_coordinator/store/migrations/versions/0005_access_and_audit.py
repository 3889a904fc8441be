"""Tokens, roles in projects, and the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# SQLite numbers rows by itself only if the key's type is exactly INTEGER.
_IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the three tables, which begin empty."""
    op.create_table(
        "token",
        sa.Column("row", _IDENTITY, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        _text("display_name"),
        _text("scopes"),
        _text("creator"),
        _number("create_us"),
        _number("expire_us"),
        _number("revoke_us"),
        sa.PrimaryKeyConstraint("row"),
        sa.UniqueConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "role_binding",
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("member", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        _text("creator"),
        _number("create_us"),
        sa.PrimaryKeyConstraint("project", "id"),
    )
    op.create_table(
        "audit",
        sa.Column("position", _IDENTITY, autoincrement=True, nullable=False),
        _number("time_us"),
        _text("principal"),
        _text("credential"),
        sa.Column("method", sa.Text(), nullable=False),
        _text("project"),
        _text("resource"),
        _text("request_id"),
        sa.Column("outcome", sa.Text(), nullable=False),
        _text("peer"),
        _number("count", 1),
        sa.PrimaryKeyConstraint("position"),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_by_project", "audit", ["project", "position"])


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False)


def _number(name: str, default: int = 0) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default=sa.text(str(default)), nullable=False)
