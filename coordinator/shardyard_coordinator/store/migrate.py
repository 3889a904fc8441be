"""Migrates the tables to this version, forward only: one transaction per migration, or all in the caller's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from shardyard_coordinator.seams import Trace
from shardyard_coordinator.store.failures import StoreTooNew
from shardyard_coordinator.store.tables import metadata

_FOLDER = Path(__file__).parent / "migrations"


def migrate(conn: Connection, trace: Trace) -> None:
    """Runs the migrations that are missing. Raises: StoreTooNew if the store has one that this version lacks."""
    config = _config(conn)
    scripts = ScriptDirectory.from_config(config)
    with nullcontext() if conn.in_transaction() else conn.begin():
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
    if conn.dialect.name == "postgresql":
        _order_by_bytes(conn)
    trace.point("migration.applied")


def is_current(conn: Connection) -> bool:
    """Whether a store is there, with the tables of this version; `conn` is in a transaction."""
    scripts = ScriptDirectory.from_config(_config(conn))
    return MigrationContext.configure(conn).get_current_revision() == scripts.get_current_head()


def _config(conn: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = conn
    return config


def _order_by_bytes(conn: Connection) -> None:
    """Orders and compares all texts by their bytes, as SQLite does, whatever the database's language."""
    columns = conn.exec_driver_sql(
        "SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "JOIN pg_collation l ON l.oid = a.attcollation WHERE c.relnamespace = current_schema()::regnamespace "
        "AND c.relkind = 'r' AND a.atttypid = 'text'::regtype AND l.collname <> 'C'"
    )
    for table, column in columns.all():
        if table in metadata.tables:
            conn.exec_driver_sql(f'ALTER TABLE "{table}" ALTER COLUMN "{column}" TYPE text COLLATE "C"')
