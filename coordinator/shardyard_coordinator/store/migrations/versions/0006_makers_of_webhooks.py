"""What a webhook's maker may view: its groups, and since when nothing is sent because it may not."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds two columns; webhooks that were made before have no groups."""
    op.add_column("webhook", sa.Column("maker_groups", sa.Text(), nullable=False, server_default=sa.text("''")))
    op.add_column("webhook", sa.Column("suspended_us", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
