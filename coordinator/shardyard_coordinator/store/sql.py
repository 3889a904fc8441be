"""How statements run: compiled once where they are hot, and with what the transaction carries beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult, Dialect
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from shardyard_coordinator.domain.records import EventRecord

_EVENTS = "shardyard.events"


class Prepared:
    """A statement compiled once a dialect: a fifth of the price of handing SQLAlchemy the construct each time.

    Only for columns whose values need no conversion: integers, floats, text, bytes.
    """

    def __init__(self, statement: ClauseElement) -> None:
        self.statement = statement
        self._compiled: dict[str, tuple[str, Sequence[str] | None, dict[str, Any]]] = {}

    def run(self, conn: Connection, **values: Any) -> CursorResult[Any]:
        """Executes it with one set of values."""
        sql, order, fixed = self.compiled(conn.dialect)
        given = {**fixed, **values}
        return conn.exec_driver_sql(sql, given if order is None else tuple(given[name] for name in order))

    def run_many(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Executes it once a row."""
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


def begin_events(conn: Connection) -> list[EventRecord]:
    """A new list for the events of the transaction that begins."""
    events: list[EventRecord] = []
    conn.info[_EVENTS] = events
    return events


def note_events(conn: Connection, records: Sequence[EventRecord]) -> None:
    """Keeps what is to be told after the commit."""
    conn.info[_EVENTS].extend(records)
