"""PostgreSQL by URL: its connections, the takeover of its lease, and what its errors mean (docs/postgresql.md).

Every setting that a transaction relies on is made in that transaction, so that poolers in transaction mode do no harm.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Final

import psycopg
from psycopg.types.numeric import Int8Dumper
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, QueuePool

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Clock, Trace
from shardyard_coordinator.store import tables
from shardyard_coordinator.store.database import AWAY, BUSY, FULL, Taken
from shardyard_coordinator.store.failures import StoreBroken, StoreFailure, StoreLed, StoreUnfit
from shardyard_coordinator.store.lease import read_lease, take_lease
from shardyard_coordinator.store.migrate import migrate
from shardyard_coordinator.store.opening import check_logs, identity
from shardyard_coordinator.store.postgres_url import parts, without_secrets
from shardyard_coordinator.store.sql import NATIVE, Native, driver_errors

OLDEST_SERVER: Final = 130_000
_CONNECT: Final[dict[str, Any]] = {
    "application_name": "shardyard",
    "connect_timeout": 5,
    # A server that vanished without a word is noticed within about ten seconds.
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    # Never a standby: readers must see what was just written.
    "target_session_attrs": "read-write",
}
# A frozen leader in a transaction would otherwise keep its successor waiting forever.
_LIMITS: Final = "SET LOCAL lock_timeout = 2000; SET LOCAL idle_in_transaction_session_timeout = {idle_ms}; "
# Compiling a query costs more than any query of the store.
_ALWAYS: Final = "SET LOCAL jit = off; SET LOCAL search_path = {schema}"
_WRITE: Final = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; " + _LIMITS.format(idle_ms=5000)
_READ: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; " + _LIMITS.format(idle_ms=60_000)
# Any number; it serialises starts on an empty database, which has no lease yet.
_START_LOCK: Final = 0x5348_4152
_ABOUT: Final = """
SELECT pg_backend_pid(), current_setting('server_encoding'), current_setting('synchronous_commit'),
       quote_ident(coalesce((SELECT nspname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
                             WHERE pg_class.oid = to_regclass('lease')), current_schema()))
"""
# Of the words of a connection that failed, which have no code: what no waiting mends, and the next step.
_CANNOT_PASS: Final = {
    r"password|authentication failed": "set PGPASSWORD, or write the password into ~/.pgpass",
    r'database ".*" does not exist': "make it: createdb --encoding UTF8 --template template0 NAME",
    r'role ".*" does not exist': "make it: createuser NAME, or name another one",
    r"pg_hba.conf|not permitted": "let this account in: a line in pg_hba.conf of the server",
    r"unsupported startup parameter": "leave `options` out of the URL, or let the pooler ignore it",
    r"certificate|invalid|could not translate host name": "correct the URL",
}

_LOST: Final = {
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P05",  # idle_session_timeout
    "25P03",  # idle_in_transaction_session_timeout
    "25P04",  # transaction_timeout
}
# Of a server that has become a standby: read_only_sql_transaction; feature_not_supported, namely BEGIN READ WRITE.
_STANDBY: Final = {"25006", "0A000"}
_PASSES: Final = {"55P03", "40P01", "40001"}  # A lock, a deadlock, a serialization failure.
_BUSY: Final = {*_PASSES, "57014", "53200", "53300", "53400"}  # Also: cancelled, memory, connections, a limit.
_UNFIT: Final = {
    "42501": "give this account the rights to create, read and change its tables",
    "42P01": "restore the tables from a backup, or give the database that has them",
    "42703": "restore the tables from a backup, or give the database that has them",
    "3F000": "create the schema, or give the database that has it",
}


class Postgres:
    """A database of a PostgreSQL server, for one process at a time: the lease sees to that."""

    renew_s: float | None = 2.0

    def __init__(self, url: str) -> None:
        """Raises: ValueError for an invalid URL, ModuleNotFoundError without psycopg."""
        self._parameters = {**_CONNECT, **parts(url), "client_encoding": "utf8"}
        self._secrets = [str(value) for name, value in parts(url).items() if name in ("password", "sslpassword")]
        self.name = without_secrets(url)

    def prepare(self) -> None:
        """Nothing: the server has its own memory."""

    def write_engine(self) -> Engine:
        """A connection of its own for each `connect`; every commit is on the server's disk."""
        engine = self._engine(poolclass=NullPool)
        event.listen(engine, "begin", _begin_write)
        return engine

    def read_engine(self, size: int) -> Engine:
        """Connections that cannot write; a transaction sees one snapshot."""
        engine = self._engine(poolclass=QueuePool, pool_size=size, max_overflow=0)
        event.listen(engine, "begin", _begin_read)
        return engine

    def _engine(self, **pool: Any) -> Engine:
        engine = create_engine("postgresql+psycopg://", creator=self._connect, use_native_hstore=False, **pool)
        event.listen(engine, "connect", _look)
        return engine

    def _connect(self) -> psycopg.Connection[Any]:
        # The driver's own transactions are off: they have other settings.
        conn = psycopg.connect(**self._parameters, autocommit=True)
        # One type for all whole numbers, so that a statement is prepared once, not once per size.
        conn.adapters.register_dumper(int, Int8Dumper)
        return conn

    def connect(self, engine: Engine) -> Connection:
        """A connection. Raises: StoreUnfit for what no waiting mends, DBAPIError."""
        try:
            return engine.connect()
        except DBAPIError as error:
            words = self.words(error)
            if step := next((step for words_of, step in _CANNOT_PASS.items() if re.search(words_of, words)), None):
                raise StoreUnfit(f"{self.name}: {words}; {step}") from error
            raise

    def take(self, engine: Engine, clock: Clock, trace: Trace) -> Taken:
        """Migrates and checks the tables and takes the lease, all in one transaction.

        Raises: StoreLed while another process leads; StoreUnfit, StoreBroken, StoreTooNew; Refused, DBAPIError.
        """
        conn = self.connect(engine)
        try:
            with conn.begin():
                self.check_free(conn)
                migrate(conn, trace)
                check_logs(conn, self.name)
                term = take_lease(conn)
                store_id, secret = identity(conn, clock)
        except BaseException:
            conn.close()
            raise
        return Taken(conn, term, store_id, secret)

    def check_free(self, conn: Connection) -> None:
        """Lets no other process start here until the transaction ends. Raises: StoreUnfit, StoreLed, DBAPIError."""
        # Migrations and copies may compute for a while between two statements.
        conn.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 60000")
        conn.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_START_LOCK})")
        self._check_fit(conn)
        # The row is locked only once it is free: a standby that freezes here must not hold up the leader.
        for locked in (False, True) if "lease" in _tables(conn) else ():
            lease = read_lease(conn, locked=locked)
            if lease is not None and lease.is_led:
                raise StoreLed(self.name, leader=lease.words(), commits=lease.commits)

    def _check_fit(self, conn: Connection) -> None:
        """Raises StoreUnfit if the server or the database cannot hold a store."""
        driver: Any = conn.connection.dbapi_connection
        version, info = driver.info.server_version, conn.info
        if version < OLDEST_SERVER:
            raise StoreUnfit(
                f"{self.name}: PostgreSQL {version // 10_000} is too old; use {OLDEST_SERVER // 10_000} or later"
            )
        if info["encoding"] != "UTF8":
            raise StoreUnfit(
                f"{self.name}: the database's encoding is {info['encoding']}, and texts need UTF8; make another one: "
                "createdb --encoding UTF8 --template template0 NAME"
            )
        if info["schema"] is None:
            raise StoreUnfit(f"{self.name}: search_path names no schema that exists; create one for this account")
        found = _tables(conn)
        if not {"lease", "meta", "alembic_version"} <= found and (others := found & _NAMES):
            raise StoreUnfit(
                f"{self.name}: its schema {info['schema']} has tables of another program "
                f"({', '.join(sorted(others)[:3])}); give an empty one, such as: createdb shardyard"
            )

    def meaning(self, error: DBAPIError, *, writes: bool = True) -> Refused | StoreFailure | None:
        """A server that is away, busy or full is refused; one that cannot hold the store ends the process."""
        state = _state(error)
        if state == "53100":
            return Refused(Reason.STORE_FULL, FULL, retry_after_s=5)
        if state in _BUSY:
            return Refused(Reason.STORE_BUSY, BUSY, retry_after_s=1)
        if self.is_lost(error, writes=writes):
            return Refused(Reason.STORE_UNAVAILABLE, AWAY, retry_after_s=1)
        if state in ("XX001", "XX002"):
            return StoreBroken(f"{self.name}: {self.words(error)}; restore it from a backup")
        if state in _UNFIT:
            return StoreUnfit(f"{self.name}: {self.words(error)}; {_UNFIT[state]}")
        return None

    def is_lost(self, error: DBAPIError, *, writes: bool = True) -> bool:
        """Whether the connection is gone, or is one to a standby, which takes no writes."""
        state = _state(error)
        if state is None:
            return isinstance(error.orig, psycopg.OperationalError | psycopg.InterfaceError)
        return state in _LOST or state.startswith("08") or (writes and state in _STANDBY)

    def passes(self, error: DBAPIError) -> bool:
        """Whether another session was in the way for a moment."""
        return _state(error) in _PASSES

    def after_commit(self, conn: Connection, wait_ms: int) -> bool:
        """Nothing: the server cleans up by itself."""
        del conn, wait_ms
        return True

    def words(self, error: DBAPIError) -> str:
        """The driver's words on one line, without a password."""
        diagnosis = getattr(error.orig, "diag", None)
        text = " ".join(str(getattr(diagnosis, "message_primary", None) or error.orig).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


_NUMBERED: Final = PGDialect_psycopg(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
_NAMES: Final = frozenset({*tables.metadata.tables, "alembic_version"})


def _tables(conn: Connection) -> set[str]:
    """The names of the tables in the store's schema."""
    found = conn.exec_driver_sql(
        "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = current_schema()::regnamespace"
    )
    return set(found.scalars())


def _look(connection: Any, record: Any) -> None:
    """Learns about a new connection what its transactions need."""
    with connection.cursor() as cursor:
        pid, encoding, durability, schema = cursor.execute(_ABOUT, prepare=False).fetchone()
    if pid != connection.info.backend_pid:
        # A pooler is in between, and the next transaction may be on another of its connections.
        connection.prepare_threshold = None
    always = _ALWAYS.format(schema=schema or "public")
    if durability not in ("on", "remote_apply"):
        always = f"SET LOCAL synchronous_commit = on; {always}"
    # The server's own placeholders: the driver would look for the others in every long statement again.
    native = Native(_NUMBERED, partial(psycopg.RawCursor, connection))
    record.info.update({"encoding": encoding, "schema": schema, "always": always, NATIVE: native})


def _begin_write(conn: Connection) -> None:
    _begin(conn, _WRITE)


def _begin_read(conn: Connection) -> None:
    _begin(conn, _READ)


def _begin(conn: Connection, text: str) -> None:
    """Begins a transaction with its settings, in one message, which cannot be a prepared statement."""
    driver: Any = conn.connection
    with driver_errors(conn, text), driver.cursor() as cursor:
        cursor.execute(text + conn.info["always"], prepare=False)


def _state(error: DBAPIError) -> str | None:
    state = getattr(error.orig, "sqlstate", None)
    return None if state is None else str(state)
