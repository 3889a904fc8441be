"""Copies every row from one database to another, and proves that all of them arrived."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, insert, select

from shardyard_coordinator.store import tables
from shardyard_coordinator.store.failures import StoreBroken

_ROWS_AT_ONCE = 200
_MODULUS = 1 << 128


@dataclass(frozen=True)
class Sum:
    """The rows of a table: their number, and a checksum that does not depend on their order."""

    rows: int
    digest: int


@dataclass(frozen=True)
class Copied:
    """The checksum of each table, and how many texts had a NUL, which PostgreSQL does not take."""

    sums: Mapping[str, Sum]
    replaced: int

    @property
    def rows(self) -> int:
        """The rows of all tables."""
        return sum(each.rows for each in self.sums.values())


def copy_rows(source: Connection, target: Connection) -> Copied:
    """Copies all rows into empty tables of the same version, then reads them again and compares.

    Both connections are in a transaction. The lease continues with the next term, and nobody holds it. Row ids are
    never used again, also those of removed rows. Raises: StoreBroken if the target's rows differ.
    """
    sums: dict[str, Sum] = {}
    replaced = 0
    for table in _copied():
        rows = digest = 0
        for batch in _batches(source, table):
            clean = [tuple(_clean(value) for value in row) for row in batch]
            replaced += sum(row != tuple(old) for row, old in zip(clean, batch, strict=True))
            names = [column.name for column in table.columns]
            target.execute(insert(table), [dict(zip(names, row, strict=True)) for row in clean])
            rows, digest = rows + len(clean), digest + _digest(clean)
        sums[table.name] = Sum(rows, digest % _MODULUS)
    _continue_lease(source, target)
    for table in _numbered():
        _set_last_id(target, table, _last_id(source, table))
    arrived = sums_of(target)
    for name, each in sums.items():
        if arrived[name] != each:
            raise StoreBroken(
                f"the table {name} did not arrive as it was: {each.rows} rows were sent and {arrived[name].rows} are "
                "there, or their content differs; nothing was kept, check the disks and try again"
            )
    return Copied(sums, replaced)


def sums_of(conn: Connection) -> dict[str, Sum]:
    """The checksum of every copied table."""
    sums: dict[str, Sum] = {}
    for table in _copied():
        rows = digest = 0
        for batch in _batches(conn, table):
            rows, digest = rows + len(batch), digest + _digest([tuple(_clean(value) for value in row) for row in batch])
        sums[table.name] = Sum(rows, digest % _MODULUS)
    return sums


def is_empty(conn: Connection) -> bool:
    """Whether no table has a row; all of them exist."""
    return all(conn.execute(select(table).limit(1)).first() is None for table in tables.metadata.sorted_tables)


def _copied() -> list[Table]:
    return [table for table in tables.metadata.sorted_tables if table is not tables.lease]


def _numbered() -> list[Table]:
    return [table for table in _copied() if table.dialect_options["sqlite"]["autoincrement"]]


def _batches(conn: Connection, table: Table) -> Iterator[Sequence[Any]]:
    with conn.execution_options(yield_per=_ROWS_AT_ONCE).execute(select(table)) as rows:
        yield from rows.partitions()


def _clean(value: Any) -> Any:
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


def _digest(rows: Sequence[tuple[Any, ...]]) -> int:
    return sum(int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest(), "big") for row in rows)


def _continue_lease(source: Connection, target: Connection) -> None:
    lease = tables.lease.c
    term = source.execute(select(lease.term).where(lease.id == 1)).scalar() or 0
    target.execute(insert(tables.lease).values(id=1, term=term))


def _last_id(conn: Connection, table: Table) -> int:
    """The largest row id that the table has ever given."""
    if conn.dialect.name == "sqlite":
        found = conn.exec_driver_sql(f"SELECT seq FROM sqlite_sequence WHERE name = '{table.name}'").scalar()
        return int(found or 0)
    sequence = f"pg_get_serial_sequence('{table.name}', '{_id_of(table)}')"
    name = conn.exec_driver_sql(f"SELECT {sequence}").scalar_one()
    last, is_called = conn.exec_driver_sql(f"SELECT last_value, is_called FROM {name}").one()
    return int(last) if is_called else 0


def _set_last_id(conn: Connection, table: Table, last: int) -> None:
    if not last:
        return
    if conn.dialect.name == "sqlite":
        conn.exec_driver_sql(f"DELETE FROM sqlite_sequence WHERE name = '{table.name}'")
        conn.exec_driver_sql(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('{table.name}', {last})")
        return
    conn.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('{table.name}', '{_id_of(table)}'), {last})")


def _id_of(table: Table) -> str:
    [column] = table.primary_key.columns
    return str(column.name)
