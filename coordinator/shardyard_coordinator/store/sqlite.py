"""The embedded database: its lock, its connections, and what its errors mean."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sqlite3
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.seams import Clock, Trace
from shardyard_coordinator.store.database import BUSY, FULL, Taken
from shardyard_coordinator.store.failures import StoreBroken, StoreDead, StoreFailure, StoreLocked, StoreMoved
from shardyard_coordinator.store.lease import moved_to, take_lease
from shardyard_coordinator.store.migrate import migrate
from shardyard_coordinator.store.opening import check_logs, identity

_READ_AHEAD_BYTES = 4 << 20
MAX_LOG_BYTES = 32 << 20
_BUSY_MS = 5000
LOG_WAIT_MS = 250
"""As long as writers wait for the readers of a log that is to be emptied."""

_log = logging.getLogger(__name__)
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "ncpfs"}


class Sqlite:
    """A database in a file, for one process at a time: `FileLock` sees to that."""

    renew_s: float | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def connect(self, engine: Engine) -> Connection:
        """A connection."""
        return engine.connect()

    def check_free(self, conn: Connection) -> None:
        """Nothing: `FileLock` has seen to it."""
        del conn

    def prepare(self) -> None:
        """Brings the file into memory."""
        read_ahead(self.path)

    def write_engine(self) -> Engine:
        """One connection; every transaction takes the write lock at once, every commit is on the disk."""
        return write_engine(self.path)

    def read_engine(self, size: int) -> Engine:
        """Connections that cannot write; a transaction sees one snapshot."""
        return read_engine(self.path, size)

    def take(self, engine: Engine, clock: Clock, trace: Trace) -> Taken:
        """Migrates and checks the file, and begins a new term. Raises: StoreFailure, DBAPIError."""
        conn = engine.connect()
        try:
            migrate(conn, trace)
            with conn.begin():
                verdict = conn.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
                if verdict != "ok":
                    raise StoreBroken(f"{self.path} is damaged: {verdict}; restore it from a backup")
                check_logs(conn, self.name)
            with conn.begin():
                if where := moved_to(conn):
                    raise StoreMoved(
                        f"the store {self.path} was moved to {where}; start the service with --store and that URL"
                    )
                term = take_lease(conn)
                store_id, secret = identity(conn, clock)
        except BaseException:
            conn.close()
            raise
        return Taken(conn, term, store_id, secret)

    def meaning(self, error: DBAPIError, *, writes: bool = True) -> Refused | StoreFailure | None:
        """A full or busy file is refused; one that cannot be read or written ends the process."""
        return meaning(error, self.path, writes=writes)

    def is_lost(self, error: DBAPIError, *, writes: bool = True) -> bool:
        """Never: the file is on this machine."""
        del error, writes
        return False

    def passes(self, error: DBAPIError) -> bool:
        """Never: SQLite has waited already."""
        del error
        return False

    def after_commit(self, conn: Connection, wait_ms: int) -> bool:
        """Empties a long write-ahead log."""
        return empty_log(conn, self.path, wait_ms)

    def words(self, error: DBAPIError) -> str:
        """SQLite's words."""
        return str(error.orig)


class FileLock:
    """`flock` on `<database>.lock` for as long as the process lives.

    The file is never unlinked, because a second holder could then lock a new one. It names its holder, for the error.
    Raises: StoreLocked.
    """

    def __init__(self, database: Path, now_us: int) -> None:
        path = database.with_name(database.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(self._descriptor, 4096, 0))
            os.close(self._descriptor)
            raise StoreLocked(str(database), **holder) from None
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since_us": now_us})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Releases the lock; the file stays."""
        os.close(self._descriptor)


def _holder(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = {}
    return {"pid": int(found.get("pid", 0)), "host": str(found.get("host", "?")), "since_us": found.get("since_us", 0)}


def refuse_network_file_system(folder: Path) -> None:
    """Raises StoreBroken on a network file system, where SQLite's locks and shared memory do not work."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return
    best = ("", "")
    for line in mounts.read_text(errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        inside = folder == Path(point) or Path(point) in folder.parents
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    if best[1] in _NETWORK:
        raise StoreBroken(f"{folder} is on a network file system ({best[1]}); the store needs a local disk")


def read_ahead(path: Path) -> None:
    """Reads the database in order, so that the checks at the start, which read here and there, find it in memory.

    Only under the `FileLock` and before this process has a connection: closing the file would drop the locks that
    SQLite holds on it. A database over half of the free memory is not read.
    """
    room = psutil.virtual_memory().available // 2
    block = bytearray(_READ_AHEAD_BYTES)
    for each in (path, path.with_name(path.name + "-wal")):
        # SQLite reports problems of the file better.
        with contextlib.suppress(OSError):
            if each.stat().st_size <= room:
                with each.open("rb", buffering=0) as file:
                    while file.readinto(block):
                        pass


def write_engine(path: Path) -> Engine:
    """One connection; every transaction takes the write lock at once, every commit is on the disk."""
    engine = create_engine(f"sqlite:///{path}", poolclass=StaticPool, connect_args=_ARGUMENTS)
    event.listen(engine, "connect", _prepare_writer)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def read_engine(path: Path, size: int) -> Engine:
    """Connections that cannot write; a transaction sees one snapshot."""
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool, pool_size=size, connect_args=_ARGUMENTS)
    event.listen(engine, "connect", _prepare_reader)
    event.listen(engine, "begin", _begin)
    return engine


# The driver's own transactions are off: it would begin them late and deferred.
_ARGUMENTS = {"check_same_thread": False, "isolation_level": None, "timeout": 5.0, "cached_statements": 512}


def _prepare_writer(connection: Any, _record: object) -> None:
    connection.text_factory = _text
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={_BUSY_MS}",
        "cache_size=-32768",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _prepare_reader(connection: Any, _record: object) -> None:
    connection.text_factory = _text
    for pragma in (f"busy_timeout={_BUSY_MS}", "query_only=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _text(data: bytes) -> str:
    """Decodes a text that is not UTF-8 as far as possible, so that it hides no other row."""
    return data.decode("utf-8", "replace")


def _begin_immediate(conn: Connection) -> None:
    # A read transaction that upgrades later gets SQLITE_BUSY at once, whatever the busy timeout.
    conn.exec_driver_sql("BEGIN IMMEDIATE")


def _begin(conn: Connection) -> None:
    conn.exec_driver_sql("BEGIN")


def empty_log(conn: Connection, path: Path, wait_ms: int) -> bool:
    """Moves a long write-ahead log into the database; False if readers prevented that now.

    By itself SQLite restarts the log only when nobody reads it. With overlapping readers that never happens, and the
    log grows forever. Once all of it is in the database, new readers do not need it, and the old ones are waited for,
    `wait_ms` at most. Outside of transactions only.
    """
    try:
        if path.with_name(path.name + "-wal").stat().st_size < MAX_LOG_BYTES:
            return True
    except FileNotFoundError:
        return True
    driver = conn.connection
    driver.execute(f"PRAGMA busy_timeout={wait_ms}")
    try:
        [[busy, *_]] = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as error:
        # Commits are in the log already, so a full disk must not fail them; the next write reports it.
        _log.warning("the write-ahead log of %s could not be emptied: %s", path, error)
        return False
    finally:
        driver.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    return not busy


def meaning(error: DBAPIError, path: Path, *, writes: bool = True) -> Refused | StoreFailure | None:
    """What a driver's error means for the caller (Refused) or the process (StoreFailure); None: a defect.

    `writes`: it came from the writing connection, where a read-only error is one of the disk.
    """
    code = getattr(error.orig, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return Refused(Reason.STORE_FULL, FULL, retry_after_s=5)
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Refused(Reason.STORE_BUSY, BUSY, retry_after_s=1)
    if primary in _DEAD and (writes or primary != sqlite3.SQLITE_READONLY):
        return StoreDead(f"{path}: {error.orig}; {_DEAD[primary]}, then start the service again")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreBroken(f"{path}: {error.orig}; restore it from a backup")
    return None


_RIGHTS = (
    "let this account write it, the files beside it and their folder, and mount its disk so that it can be written"
)
_DEAD = {
    sqlite3.SQLITE_IOERR: "check its disk",
    sqlite3.SQLITE_CANTOPEN: "check this file, those of its name beside it, and their folder",
    sqlite3.SQLITE_READONLY: _RIGHTS,
    sqlite3.SQLITE_PERM: _RIGHTS,
}
