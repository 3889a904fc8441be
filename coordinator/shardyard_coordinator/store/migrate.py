"""Migrates the tables to this version: one transaction per migration, forward only."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from shardyard_coordinator.seams import Trace
from shardyard_coordinator.store.failures import StoreTooNew

_FOLDER = Path(__file__).parent / "migrations"


def migrate(conn: Connection, trace: Trace) -> None:
    """Runs the migrations that are missing. Raises: StoreTooNew if the store has one that this version lacks."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = conn
    scripts = ScriptDirectory.from_config(config)
    with conn.begin():
        current = MigrationContext.configure(conn).get_current_revision()
    if current == scripts.get_current_head():
        return
    if current is not None:
        try:
            scripts.get_revision(current)
        except CommandError:
            raise StoreTooNew(
                f"the store is at version {current}, which this Shardyard does not know; use a newer one"
            ) from None
    command.upgrade(config, "head")
    trace.point("migration.applied")
