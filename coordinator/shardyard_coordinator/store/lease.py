"""The lease: one row that says which process leads the store, and that counts its commits.

The row is the fence: every transaction first changes it, guarded by the term and the count that its process knows, so a
process that was replaced changes nothing. It is the receipt, too: the count tells whether a commit happened whose
outcome was lost with the connection. Times are of the database's clock only.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, bindparam, insert, select, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from shardyard_coordinator.store import tables
from shardyard_coordinator.store.sql import Prepared

LEASE_US = 10_000_000
_MOVED = "moved to "
_lease = tables.lease.c


class _Now(ColumnElement[int]):
    """Microseconds since 1970 UTC, by the database's clock."""

    inherit_cache = True

    def __init__(self) -> None:
        self.type = BigInteger()


@compiles(_Now, "sqlite")
def _now_of_sqlite(_element: _Now, _compiler: SQLCompiler, **_keywords: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)"


@compiles(_Now, "postgresql")
def _now_of_postgresql(_element: _Now, _compiler: SQLCompiler, **_keywords: Any) -> str:
    # Not now(), which is the begin of the transaction.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"


_RENEW = Prepared(
    update(tables.lease)
    .where(_lease.id == 1, _lease.term == bindparam("term"), _lease.commits == bindparam("seen"))
    .values(commits=_lease.commits + 1, until_us=_Now() + LEASE_US)
)
_COLUMNS = (_lease.term, _lease.commits, _lease.holder, _lease.since_us, _lease.until_us)


@dataclass(frozen=True)
class Holder:
    """A process that leads or led: its pid and host; `place` distinguishes machines, boots and containers."""

    pid: int
    host: str
    place: str = ""
    start_ticks: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """The process that asks."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), _place(), _start_ticks(pid))

    @classmethod
    def read(cls, text: str) -> Holder:
        """What `text` wrote; unknown parts are empty."""
        try:
            found = json.loads(text)
            return cls(int(found["pid"]), str(found["host"]), str(found["place"]), int(found["start_ticks"]))
        except (ValueError, KeyError, TypeError):
            pid, _, host = text.partition("@")
            return cls(int(pid) if pid.isdecimal() else 0, host or "?")

    def text(self) -> str:
        """As the row keeps it."""
        return json.dumps(vars(self))

    def is_dead(self) -> bool:
        """Whether it is certain that the process is gone: it ran here, and does not run any more."""
        return bool(self.place) and self.place == _place() and self.start_ticks != _start_ticks(self.pid)


@dataclass(frozen=True)
class Lease:
    """The row. `left_us`: how long it is valid, negative once it is over."""

    term: int
    commits: int
    holder: Holder
    since_us: int
    left_us: int

    @property
    def is_led(self) -> bool:
        """Whether another process may still lead: the lease is valid, and its holder is not known to be dead.

        A lease that would last longer than any is from before the database's clock was set back.
        """
        return 0 < self.left_us <= LEASE_US and not self.holder.is_dead()

    def words(self) -> str:
        """Who leads and since when, for the operator."""
        since = datetime.fromtimestamp(self.since_us / 1e6, UTC).isoformat(" ", "seconds").removesuffix("+00:00")
        return f"process {self.holder.pid} on {self.holder.host}, since {since} UTC"


def read_lease(conn: Connection, *, locked: bool = False) -> Lease | None:
    """The row, None in a new store; `locked` waits for a transaction that is about to change it."""
    statement = select(*_COLUMNS, _Now().label("now_us")).where(_lease.id == 1)
    row = conn.execute(statement.with_for_update() if locked else statement).first()
    if row is None:
        return None
    return Lease(row.term, row.commits, Holder.read(row.holder), row.since_us, row.until_us - row.now_us)


def take_lease(conn: Connection) -> int:
    """Makes this process the leader, also if another one was; returns the new term."""
    before = read_lease(conn)
    if before is None:
        conn.execute(insert(tables.lease).values(id=1))
    term = 1 if before is None else before.term + 1
    values = {"term": term, "commits": 0, "holder": Holder.this_process().text()}
    conn.execute(
        update(tables.lease).where(_lease.id == 1).values(**values, since_us=_Now(), until_us=_Now() + LEASE_US)
    )
    return term


def renew_lease(conn: Connection, term: int, commits: int) -> bool:
    """Counts a commit and renews the lease; False if another process has taken it."""
    return _RENEW.run(conn, term=term, seen=commits).rowcount == 1


def give_up_lease(conn: Connection, term: int) -> None:
    """Ends the lease at once, so that the next process does not wait for it."""
    conn.execute(update(tables.lease).where(_lease.id == 1, _lease.term == term).values(until_us=0))


def note_moved(conn: Connection, where: str) -> None:
    """Records that the store continues elsewhere, so that nobody leads it here again."""
    conn.execute(update(tables.lease).where(_lease.id == 1).values(holder=_MOVED + where))


def moved_to(conn: Connection) -> str:
    """Where the store continues; empty if it is here."""
    holder = conn.execute(select(_lease.holder).where(_lease.id == 1)).scalar() or ""
    return str(holder).removeprefix(_MOVED) if holder.startswith(_MOVED) else ""


def _place() -> str:
    """This boot of this machine, and the container's own numbers of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """When a process of this machine started, which distinguishes it from a later one of the same number; 0: gone."""
    try:
        # The name, in brackets, may have spaces and brackets itself.
        state, *others = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in ("Z", "X") else int(others[18])
