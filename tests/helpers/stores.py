"""Which database the tests' stores are in: SQLite in a test's folder, or a private PostgreSQL server.

`SHARDYARD_TEST_STORE=postgresql` puts the stores of all tests there (`make test STORE=postgresql`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from helpers.postgres import database_of, shared_server

SQLITE, POSTGRESQL = "sqlite", "postgresql"
KINDS = (SQLITE, POSTGRESQL)
_OF_ALL, _OF_CHILD = "SHARDYARD_TEST_STORE", "SHARDYARD_TEST_STORE_URL"
_kinds = [os.environ.get(_OF_ALL, SQLITE)]


def kind() -> str:
    """The kind of the stores that are made now."""
    assert _kinds[-1] in KINDS, f"SHARDYARD_TEST_STORE is one of {', '.join(KINDS)}"
    return _kinds[-1]


@contextlib.contextmanager
def using(chosen: str) -> Iterator[None]:
    _kinds.append(chosen)
    try:
        yield
    finally:
        _kinds.pop()


def store_at(folder: Path) -> str | Path:
    """What `open_store` takes for the store that belongs to a folder."""
    if url := os.environ.get(_OF_CHILD):
        return url
    return database_of(folder) if kind() == POSTGRESQL else folder / "store.db"


def begin_without_tables(folder: Path) -> None:
    """Makes the store that belongs to a folder a new one; those in PostgreSQL have their tables from the beginning."""
    if kind() == POSTGRESQL:
        database_of(folder, template="template1")


def of_child(folder: Path) -> Mapping[str, str]:
    """What leads `store_at` in a child process to the same store, whatever the stores of all tests are."""
    return {_OF_CHILD: str(store_at(folder))} if kind() == POSTGRESQL else {_OF_ALL: SQLITE}


def of_service(folder: Path) -> Mapping[str, str]:
    """What leads a service with its state in a folder to its store."""
    return {"SHARDYARD_STORE": str(store_at(folder))} if kind() == POSTGRESQL else {}


def change_by_hand(folder: Path, statement: str) -> None:
    """Runs SQL on a store that nobody has open."""
    if kind() == POSTGRESQL:
        shared_server().execute(statement, database=str(store_at(folder)).rpartition("/")[2])
        return
    # In a process of its own: one that closes the file of a database loses its locks on it.
    code = f"import sqlite3; c = sqlite3.connect({str(folder / 'store.db')!r}); c.execute({statement!r}); c.commit()"
    subprocess.run([sys.executable, "-c", code], check=True)
