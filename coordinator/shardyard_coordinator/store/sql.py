"""How statements run: compiled once where they are hot, and with what the transaction carries beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from shardyard_coordinator.domain.records import EventRecord

_EVENTS = "shardyard.events"


class Rows:
    """What a statement answered, all of it; `rowcount` of a change."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rows: Sequence[tuple[Any, ...]], rowcount: int) -> None:
        self._rows = rows
        self.rowcount = rowcount

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)

    def first(self) -> tuple[Any, ...] | None:
        """The first row, None where there is none."""
        return self._rows[0] if self._rows else None

    def scalar_one(self) -> Any:
        """The one column of the one row."""
        [[value]] = self._rows
        return value


class Prepared:
    """A statement compiled once a dialect and handed to the driver as it is: a tenth of what it costs otherwise.

    Only for columns whose values need no conversion: integers, floats, text, bytes.
    """

    def __init__(self, statement: ClauseElement) -> None:
        self.statement = statement
        self._compiled: dict[str, tuple[str, Sequence[str] | None, dict[str, Any]]] = {}

    def run(self, conn: Connection, **values: Any) -> Rows:
        """Executes it with one set of values. Raises: DBAPIError."""
        sql, order, fixed = self.compiled(conn.dialect)
        given = {**fixed, **values} if fixed else values
        return execute(conn, sql, given if order is None else [given[name] for name in order])

    def run_many(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Executes it once a row. Raises: DBAPIError."""
        sql, order, fixed = self.compiled(conn.dialect)
        full = [{**fixed, **row} for row in rows]
        conn.exec_driver_sql(sql, full if order is None else [tuple(row[name] for name in order) for row in full])

    def compiled(self, dialect: Dialect) -> tuple[str, Sequence[str] | None, dict[str, Any]]:
        """The SQL, the order of its parameters (None: by name) and those with a value of their own."""
        found = self._compiled.get(dialect.name)
        if found is None:
            compiled = self.statement.compile(dialect=dialect)
            assert isinstance(compiled, SQLCompiler)
            order = compiled.positiontup if compiled.positional else None
            fixed = {name: value for name, value in compiled.params.items() if value is not None}
            found = self._compiled[dialect.name] = (str(compiled), order, fixed)
        return found


def execute(conn: Connection, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Rows:
    """Hands SQL to the driver of a connection that is in a transaction. Raises: DBAPIError."""
    cursor = conn.connection.cursor()
    try:
        cursor.execute(sql, values)
        return Rows(cursor.fetchall() if cursor.description else (), cursor.rowcount)
    except conn.dialect.loaded_dbapi.Error as error:
        kind = conn.dialect.loaded_dbapi.Error
        raise DBAPIError.instance(sql, None, error, kind, dialect=conn.dialect) from error
    finally:
        cursor.close()


def begin_events(conn: Connection) -> list[EventRecord]:
    """A new list for the events of the transaction that begins."""
    events: list[EventRecord] = []
    conn.info[_EVENTS] = events
    return events


def note_events(conn: Connection, records: Sequence[EventRecord]) -> None:
    """Keeps what is to be told after the commit."""
    conn.info[_EVENTS].extend(records)
