"""`shardyard store`: a store as one file, a file as a store, and from SQLite to PostgreSQL (docs/postgresql.md).

A backup is a SQLite file with the store's own tables, whatever the store's database is. Each command either does all of
its work or leaves no trace, and compares every row that it has written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store.copying import Copied, copy_rows, is_empty, sums_of
from shardyard_coordinator.store.database import Database
from shardyard_coordinator.store.failures import StoreAway, StoreBroken, StoreFailure, StoreUnfit
from shardyard_coordinator.store.lease import note_moved
from shardyard_coordinator.store.migrate import is_current, migrate
from shardyard_coordinator.store.opening import stored_identity
from shardyard_coordinator.store.sqlite import Sqlite
from shardyard_coordinator.store.store import database_at, lock_store


@dataclass(frozen=True)
class Report:
    """What was copied from where to where."""

    store_id: str
    source: str
    target: str
    copied: Copied


def back_up(store: str | Path, file: Path) -> Report:
    """Writes a snapshot of the store into a new file; a service may run meanwhile. Raises: StoreFailure, OSError."""
    database = database_at(store)
    if file.exists():
        raise StoreUnfit(f"{file} exists; choose another name, or move it away")
    with _words(database), _snapshot(database) as source, _new_file(file) as target:
        return _report(source, target, database.name, str(file))


def restore(file: Path, store: str | Path) -> Report:
    """Makes the store from a backup; it must not be there yet. Raises: StoreFailure, OSError."""
    database = database_at(store)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "backup.db"
        _copy_backup(file, copy)
        with _words(Sqlite(file)):
            _bring_up_to_date(copy)
        with _words(database), _snapshot(Sqlite(copy)) as source, _target(database) as target:
            return _report(source, target, str(file), database.name)


def move(state_dir: Path, url: str) -> Report:
    """Moves the SQLite store of a state directory to PostgreSQL, which continues it; the file is kept, and refused.

    A move whose end was interrupted is completed. Raises: StoreFailure, OSError.
    """
    source_at, database = Sqlite(state_dir.absolute() / "store.db"), database_at(url)
    if not source_at.path.exists():
        raise StoreUnfit(f"{source_at.path} does not exist; give the state directory that has it")
    lock = lock_store(source_at.path, SystemClock())
    try:
        with _words(source_at):
            _bring_up_to_date(source_at.path)
        with _words(database), _snapshot(source_at) as source:
            report = _moved_before(source, database, source_at.name)
            if report is None:
                with _target(database) as target:
                    report = _report(source, target, source_at.name, database.name)
        with _writing(source_at.path) as conn, conn.begin():
            note_moved(conn, database.name)
        return report
    finally:
        lock.release()


def _report(source: Connection, target: Connection, source_name: str, target_name: str) -> Report:
    found = stored_identity(source)
    if found is None:
        raise StoreUnfit(f"{source_name} has no store yet; start a service on it first")
    return Report(found[0], source_name, target_name, copy_rows(source, target))


def _moved_before(source: Connection, database: Database, source_name: str) -> Report | None:
    """The report of a move that has arrived, but was interrupted before its source was marked."""
    found = stored_identity(source)
    with contextlib.closing(database.connect(database.write_engine())) as conn, conn.begin():
        database.check_free(conn)
        if found is None or not inspect(conn).has_table("meta") or stored_identity(conn) != found:
            return None
        sums = sums_of(source)
        return Report(found[0], source_name, database.name, Copied(sums, 0)) if sums_of(conn) == sums else None


@contextlib.contextmanager
def _snapshot(database: Database) -> Iterator[Connection]:
    """A connection that reads the store as it is now, of this version of Shardyard. Raises: StoreUnfit."""
    if isinstance(database, Sqlite) and not database.path.exists():
        raise StoreUnfit(f"{database.name} does not exist; give the state directory or the URL of the store")
    engine = database.read_engine(1)
    try:
        with contextlib.closing(database.connect(engine)) as conn, conn.begin():
            if not is_current(conn):
                raise StoreUnfit(
                    f"{database.name} has no store of this version of Shardyard; start a service of this version on it"
                )
            yield conn
    finally:
        engine.dispose()


@contextlib.contextmanager
def _target(database: Database) -> Iterator[Connection]:
    """A connection in the transaction that fills the empty store."""
    if isinstance(database, Sqlite):
        lock = lock_store(database.path, SystemClock())
        try:
            if database.path.exists():
                raise StoreUnfit(f"{database.name} exists; move it away, or give another state directory")
            with _new_file(database.path) as conn:
                yield conn
        finally:
            lock.release()
        return
    with contextlib.closing(database.connect(database.write_engine())) as conn, conn.begin():
        database.check_free(conn)
        migrate(conn, NullTrace())
        if not is_empty(conn):
            found = stored_identity(conn)
            raise StoreUnfit(
                f"{database.name} is not empty: it has the store {found[0] if found else ''}; give an empty database, "
                "such as: createdb --encoding UTF8 --template template0 NAME"
            )
        yield conn


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Connection]:
    """A connection in the transaction that fills a new SQLite store, which has its name only once it is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with _writing(draft) as conn:
            migrate(conn, NullTrace())
            with conn.begin():
                yield conn
            # One file, without a log beside it.
            conn.connection.execute("PRAGMA journal_mode = DELETE")
        if path.exists():
            raise StoreUnfit(f"{path} exists by now; choose another name, or move it away")
        draft.rename(path)
        _sync(path.parent)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            draft.with_name(draft.name + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Connection]:
    engine = Sqlite(path).write_engine()
    try:
        with contextlib.closing(engine.connect()) as conn:
            yield conn
    finally:
        engine.dispose()


def _copy_backup(file: Path, copy: Path) -> None:
    """Raises: StoreUnfit if the file is not a SQLite database."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as content:
        if content.read(len(_MAGIC)) == _MAGIC:
            shutil.copyfile(file, copy)
            return
    raise StoreUnfit(f"{file} is not a backup; give a file that `shardyard store backup` has written")


_MAGIC = b"SQLite format 3\0"


def _bring_up_to_date(path: Path) -> None:
    """Checks a SQLite store and migrates it to this version, as a start does. Raises: StoreFailure, DBAPIError."""
    with _writing(path) as conn:
        with conn.begin():
            verdict = conn.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if verdict != "ok":
            raise StoreBroken(f"{path} is damaged: {verdict}; use another backup")
        migrate(conn, NullTrace())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _words(database: Database) -> Iterator[None]:
    """Raises errors of the driver as StoreFailure, with the driver's words and without a password."""
    try:
        yield
    except DBAPIError as error:
        found = database.meaning(error)
        if isinstance(found, StoreFailure):
            raise found from error
        raise StoreAway(f"{database.name}: {database.words(error)}; nothing was kept, try again") from error
