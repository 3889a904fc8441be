"""How statements run: hot ones are compiled once; and the events that a transaction collects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Dialect, Table, bindparam, insert, update
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from shardyard_coordinator.domain.records import EventRecord

_EVENTS = "shardyard.events"
_METRICS = "shardyard.metrics"
_T = TypeVar("_T")


class Rows:
    """The whole result of a statement; `rowcount` of a change."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rows: Sequence[tuple[Any, ...]], rowcount: int) -> None:
        self._rows = rows
        self.rowcount = rowcount

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)

    def first(self) -> tuple[Any, ...] | None:
        """The first row, None if there is none."""
        return self._rows[0] if self._rows else None

    def scalar_one(self) -> Any:
        """The single value of the single row."""
        [[value]] = self._rows
        return value


class Prepared:
    """A statement that is compiled once per dialect and passed to the driver: a tenth of the usual cost.

    Only for columns whose values need no conversion: integers, floats, text, bytes.
    """

    def __init__(self, statement: ClauseElement) -> None:
        self.statement = statement
        self._compiled: dict[str, tuple[str, Sequence[str] | None, dict[str, Any]]] = {}

    def run(self, conn: Connection, **values: Any) -> Rows:
        """Executes it with one set of values. Raises: DBAPIError."""
        sql, order, fixed = self.compiled(_native(conn).dialect)
        given = {**fixed, **values} if fixed else values
        return execute(conn, sql, given if order is None else [given[name] for name in order])

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


class PreparedInsert:
    """An INSERT of many rows, compiled once per number of rows: a driver call costs more than several rows.

    For the columns that `Prepared` is for. `returning` names the columns to return of each row, in no order.
    """

    _MOST, _STEP = 64, 16

    def __init__(self, table: Table, names: Iterable[str], *, returning: Sequence[str] = ()) -> None:
        wanted = set(names)
        self._table = table
        self._names = [column.name for column in table.columns if column.name in wanted]
        self._returning = returning
        self._prepared: dict[int, Prepared] = {}

    def run(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
        """Inserts the rows. Raises: DBAPIError."""
        found: list[tuple[Any, ...]] = []
        first = 0
        while first < len(rows):
            left = min(self._MOST, len(rows) - first)
            # Sixteen rows at a time, then the rest: few calls with few different statements.
            count = left if left < self._STEP else left - left % self._STEP
            found += self._run(conn, rows[first : first + count])
            first += count
        return found

    def _run(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> Rows:
        sql, order, _ = self.of(len(rows)).compiled(_native(conn).dialect)
        if order is not None:
            return execute(conn, sql, [row[name] for row in rows for name in self._names])
        return execute(conn, sql, {f"{name}_{at}": row[name] for at, row in enumerate(rows) for name in self._names})

    def of(self, count: int) -> Prepared:
        """The statement for this number of rows."""
        prepared = self._prepared.get(count)
        if prepared is None:
            values: list[dict[str, Any]] = [
                {name: bindparam(f"{name}_{at}") for name in self._names} for at in range(count)
            ]
            columns = [self._table.columns[name] for name in self._returning]
            statement = insert(self._table).values(values)
            prepared = self._prepared[count] = Prepared(statement.returning(*columns) if columns else statement)
        return prepared


class PreparedUpdate:
    """An UPDATE of the rows that meet `guards`, compiled once for each set of columns that it changes.

    For the columns that `Prepared` is for. The guards' parameters are given by name; `also` changes with every run.
    """

    def __init__(
        self,
        table: Table,
        *guards: ColumnElement[bool],
        also: Mapping[str, Any] | None = None,
        returning: Sequence[ColumnElement[Any]] = (),
    ) -> None:
        self._table = table
        self._guards = guards
        self._also = also or {}
        self._returning = returning
        self._prepared: dict[tuple[str, ...], Prepared] = {}

    def run(self, conn: Connection, changes: Mapping[str, Any], **guarded: Any) -> Rows:
        """Executes the statement. Raises: DBAPIError."""
        values = {f"new_{name}": value for name, value in changes.items()}
        return self.of(tuple(changes)).run(conn, **values, **guarded)

    def of(self, names: tuple[str, ...]) -> Prepared:
        """The statement for these columns."""
        prepared = self._prepared.get(names)
        if prepared is None:
            values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in names}
            statement = update(self._table).where(*self._guards).values({**self._also, **values})
            prepared = Prepared(statement.returning(*self._returning) if self._returning else statement)
            self._prepared[names] = prepared
        return prepared


def execute(conn: Connection, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Rows:
    """Hands SQL to the driver of a connection that is in a transaction. Raises: DBAPIError."""
    with driver_errors(conn, sql):
        cursor = _native(conn).cursor()
        try:
            cursor.execute(sql, values)
            return Rows(cursor.fetchall() if cursor.description else (), cursor.rowcount)
        finally:
            cursor.close()


class Native(NamedTuple):
    """How statements that are compiled once reach the driver: in which dialect, through which cursors."""

    dialect: Dialect
    cursor: Callable[[], Any]


NATIVE = "shardyard.native"
"""Where a connection's `info` has its Native, if that is not SQLAlchemy's own."""


def _native(conn: Connection) -> Native:
    found: Native | None = conn.info.get(NATIVE)
    return found or Native(conn.dialect, conn.connection.cursor)


@contextlib.contextmanager
def driver_errors(conn: Connection, sql: str) -> Iterator[None]:
    """Raises the driver's errors as SQLAlchemy does, without the values."""
    kind = conn.dialect.loaded_dbapi.Error
    try:
        yield
    except kind as error:
        raise DBAPIError.instance(sql, None, error, kind, dialect=conn.dialect) from error


def in_savepoint(conn: Connection, operation: Callable[[Connection], _T]) -> tuple[_T | None, Exception | None]:
    """The result of an operation, or its error, which undid its changes and its events.

    Raises: DBAPIError, if it is not about the operation's own values.
    """
    events: list[EventRecord] = conn.info[_EVENTS]
    before = len(events)
    execute(conn, "SAVEPOINT operation")
    try:
        value = operation(conn)
    except Exception as error:  # The edge between one caller's operation and the commit of the others.
        if isinstance(error, DBAPIError) and not _is_about_values(error):
            raise
        execute(conn, "ROLLBACK TO operation")
        execute(conn, "RELEASE operation")
        del events[before:]
        return None, error
    execute(conn, "RELEASE operation")
    return value, None


def _is_about_values(error: DBAPIError) -> bool:
    """Whether an operation's own values are the reason: taken, out of range, or (54000) too long for an index."""
    return isinstance(error, IntegrityError | DataError) or getattr(error.orig, "sqlstate", None) == "54000"


def begin_events(conn: Connection) -> list[EventRecord]:
    """A new list for the events of the transaction that begins."""
    events: list[EventRecord] = []
    conn.info[_EVENTS] = events
    conn.info[_METRICS] = set()
    return events


def note_events(conn: Connection, records: Sequence[EventRecord]) -> None:
    """Keeps the events to send after the commit."""
    conn.info[_EVENTS].extend(records)


def note_metrics(conn: Connection, job_uid: str) -> None:
    """Notes the jobs with new metrics, which are not events, but are announced after the commit too."""
    conn.info.setdefault(_METRICS, set()).add(job_uid)


def noted_metrics(conn: Connection) -> frozenset[str]:
    """The jobs with new metrics in the transaction, possibly including those of failed operations."""
    return frozenset(conn.info[_METRICS])
