"""What a backup and a move carry: every table there is, the numbers of rows that are gone, and which secrets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Float, LargeBinary, Table, Text, delete, insert, inspect, select

from helpers.guarded import guarded, metadata
from helpers.lost_commits import opened
from helpers.postgres import shared_server
from helpers.service import create_webhook
from helpers.stores import KINDS, of_service
from shardyard.cli.app import run
from shardyard_coordinator.serve import signing
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.copying import sums_of
from shardyard_coordinator.store.store import database_at

ROWS = 3
FIRST_ID = 1 << 40
# The store's own two rows are there from the start.
FILLED = [table for table in tables.metadata.sorted_tables if table not in (tables.meta, tables.lease)]
NUMBERED = [table for table in FILLED if table.dialect_options["sqlite"]["autoincrement"]]


def extreme(column: Column[Any], at: int) -> Any:
    """A value of the column's type, another one for each row, as odd as the type allows."""
    if column.primary_key and column.autoincrement is True:
        return FIRST_ID + at
    if isinstance(column.type, LargeBinary):
        return None if column.nullable and at == 0 else bytes(range(256)) * at
    if isinstance(column.type, Float):
        return (None if column.nullable else 0.1, -math.inf, 5e-324)[at]
    if isinstance(column.type, Text):
        return ("", "Ä\u2028%_\\' \U0001f600", "\x7f\ufffdé")[at]
    return ((1 << 63) - 1, -(1 << 63), 0)[at]


def fill(conn: Connection) -> None:
    """Rows in every table, of which the last one is gone again where rows are numbered."""
    for table in FILLED:
        for at in range(ROWS):
            conn.execute(insert(table).values({column.name: extreme(column, at) for column in table.columns}))
    for table in NUMBERED:
        conn.execute(delete(table).where(table.primary_key.columns[0] == FIRST_ID + ROWS - 1))


@dataclass
class Content:
    """The rows of every table but the lease; and of SQLite the last number that each table has given."""

    rows: dict[str, list[tuple[Any, ...]]]
    numbers: dict[str, int]


def content(at: str | Path) -> Content:
    with reading(at) as conn:
        assert set(inspect(conn).get_table_names()) == {*tables.metadata.tables, "alembic_version"}
        rows = {table.name: rows_of(conn, table) for table in tables.metadata.sorted_tables}
        assert {name: len(each) for name, each in rows.items() if name != "lease"} == {
            name: each.rows for name, each in sums_of(conn).items()
        }
        query = "SELECT name, seq FROM sqlite_sequence"
        is_sqlite = conn.dialect.name == "sqlite"
        numbers = {name: seq for name, seq in conn.exec_driver_sql(query)} if is_sqlite else {}  # noqa: C416 - as rows
    return Content({name: each for name, each in rows.items() if name != "lease"}, numbers)


def rows_of(conn: Connection, table: Table) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, conn.execute(select(table))), key=repr)


@contextlib.contextmanager
def reading(at: str | Path) -> Iterator[Connection]:
    database = database_at(at)
    engine = database.read_engine(1)
    with contextlib.closing(database.connect(engine)) as conn, conn.begin():
        yield conn
    engine.dispose()


async def test_every_table_goes_to_postgresql_and_back_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, back, file = tmp_path / "state", tmp_path / "back", tmp_path / "backup.db"
    url = shared_server().database(f"tables-{tmp_path.name}"[:60].lower())
    state.mkdir()
    async with opened(state / "store.db"):
        pass
    engine = database_at(state / "store.db").write_engine()
    with contextlib.closing(engine.connect()) as conn, conn.begin():
        fill(conn)
    engine.dispose()
    before = content(state / "store.db")
    assert all(before.rows.values()) and before.numbers == {each.name: FIRST_ID + ROWS - 1 for each in NUMBERED}
    monkeypatch.setenv("SHARDYARD_STORE", url)
    assert run(["store", "migrate", str(state)]) == 0
    assert run(["store", "backup", str(file)]) == 0
    monkeypatch.delenv("SHARDYARD_STORE")
    assert run(["store", "restore", str(file), "--state-dir", str(back)]) == 0
    assert content(url).rows == before.rows
    assert content(file) == content(back / "store.db") == before


@pytest.mark.parametrize("store_kind", KINDS, indirect=True)
async def test_a_backup_has_no_token_and_has_the_secrets_that_webhooks_sign_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "backup.db"
    for name, value in of_service(tmp_path).items():
        monkeypatch.setenv(name, value)
    async with guarded(tmp_path) as service:
        tokens = [service.admin, await service.member("alice", "submitter")]
        made = await service.service.webhooks.CreateWebhook(create_webhook("hook"), metadata=metadata(tokens[1]))
        assert run(["store", "backup", str(file), "--state-dir", str(tmp_path)]) == 0
    data = file.read_bytes()
    for token in tokens:
        _, token_id, secret = token.split("_", 2)
        assert secret.encode() not in data
        # The id is there, and what tells whether a secret is right.
        assert token_id.encode() in data and hashlib.sha256(secret.encode()).digest() in data
    assert base64.b64decode(made.secret.removeprefix(signing.SECRET_PREFIX)) in data
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
