"""The seam between the store and its database: SQLite in a file (`sqlite.py`), or PostgreSQL by URL (`postgres.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.seams import Clock, Trace
from shardyard_coordinator.store.failures import StoreFailure

UNUSABLE = "the service's store cannot be used, and the service ends; the operator finds why in its log"
"""The caller's message for a StoreFailure, whose own text names paths and is for the operator."""

FULL = "the disk of the service's store is full; try again when the operator has made space"
AWAY = "the service's store does not answer; try again in a moment"
BUSY = "another process, a backup for instance, holds the service's store; try again in a moment"


@dataclass(frozen=True)
class Taken:
    """A store that this process leads from now on."""

    conn: Connection
    term: int
    store_id: str
    secret: bytes


class Database(Protocol):
    """What the store asks of its database. `name` is for the operator, and has no password.

    `renew_s`: the lease is renewed after that many seconds without a commit; None if a lock does the same.
    """

    name: str
    renew_s: float | None

    def write_engine(self) -> Engine:
        """For one connection; every commit is on the disk."""

    def read_engine(self, size: int) -> Engine:
        """For `size` connections that cannot write; a transaction sees one snapshot."""

    def connect(self, engine: Engine) -> Connection:
        """A connection. Raises: StoreUnfit for what no waiting mends, DBAPIError."""

    def check_free(self, conn: Connection) -> None:
        """In a transaction that is about to fill the database: it fits, and nobody leads a store there until the end.

        Raises: StoreUnfit, StoreLed.
        """

    def prepare(self) -> None:
        """What makes `take` faster, before this process has a connection."""

    def take(self, engine: Engine, clock: Clock, trace: Trace) -> Taken:
        """Migrates and checks the tables, and takes the lease.

        Raises: StoreFailure (StoreLed while another process leads), Refused for what may pass, DBAPIError.
        """

    def meaning(self, error: DBAPIError, *, writes: bool = True) -> Refused | StoreFailure | None:
        """What a driver's error means for the caller (Refused) or the process (StoreFailure); None: a defect.

        `writes`: it came from the writing connection.
        """

    def is_lost(self, error: DBAPIError, *, writes: bool = True) -> bool:
        """Whether the connection is gone: a commit may have happened or not, and another connection may work."""

    def passes(self, error: DBAPIError) -> bool:
        """Whether nothing was committed, and the same transaction may succeed at once."""

    def after_commit(self, conn: Connection, wait_ms: int) -> bool:
        """Keeps the database short, outside of transactions; False if readers prevented that for `wait_ms`."""

    def words(self, error: DBAPIError) -> str:
        """The driver's words about an error, for the operator: on one line, without a password."""
