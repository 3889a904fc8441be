"""Errors that keep a store from being opened, or from being used any further.

StoreFailure
├── StoreLocked    another coordinator uses it (exit 75)
├── StoreLed       another coordinator leads it (exit 75)
├── StoreAway      its server does not answer (exit 69)
├── StoreUnfit     its server, database, rights or tables do not fit (exit 78)
├── StoreMoved     it was moved to another database (exit 78)
├── StoreTooNew    a newer version of Shardyard has written it (exit 78)
├── StorageForeign the storage belongs to another store (exit 78)
├── StorageMissing the files of the store's jobs and models are missing (exit 78)
├── PlaceTaken     something else is at the path of the service's own file (exit 78)
├── FolderShared   other accounts can read the service's folders (exit 78)
├── StoreBroken    its content is invalid (exit 65)
├── StoreLost      another coordinator has the lease now (exit 75)
└── StoreDead      the disk failed, so the state in memory cannot be trusted (exit 74)
"""

from __future__ import annotations


class StoreFailure(Exception):
    """The process cannot continue with this store; `exit_code` says how it ends."""

    exit_code = 74


class StoreLocked(StoreFailure):
    """Another coordinator uses the store."""

    exit_code = 75

    def __init__(self, path: str, *, pid: int, host: str, since_us: int) -> None:
        super().__init__(f"the store {path} is in use by process {pid} on {host}; stop that one first")
        self.path = path
        self.pid = pid
        self.host = host
        self.since_us = since_us


class StoreLed(StoreFailure):
    """Another coordinator leads the store; `commits` grows while it lives."""

    exit_code = 75

    def __init__(self, name: str, *, leader: str, commits: int) -> None:
        super().__init__(
            f"the store {name} is led by {leader}; stop that one first, or start this one with --standby to wait for it"
        )
        self.leader = leader
        self.commits = commits


class StoreAway(StoreFailure):
    """The store's server does not answer."""

    exit_code = 69


class StoreUnfit(StoreFailure):
    """The server, the database, its tables or this account's rights do not fit; the message has the next step."""

    exit_code = 78


class StoreMoved(StoreFailure):
    """The store's content was moved to another database, which is its continuation."""

    exit_code = 78


class StoreTooNew(StoreFailure):
    """The store was written by a newer version."""

    exit_code = 78


class StorageForeign(StoreFailure):
    """The storage belongs to another store, so this one must not remove anything there."""

    exit_code = 78


class StorageMissing(StoreFailure):
    """The storage is empty, but the store has jobs and models: its mount is missing."""

    exit_code = 78


class FolderShared(StoreFailure):
    """Other accounts can read the state directory or the storage, and this one cannot change that."""

    exit_code = 78


class PlaceTaken(StoreFailure):
    """A folder, a pipe or another account's file is at the path of one of the service's own files."""

    exit_code = 78


class StoreBroken(StoreFailure):
    """The store has invalid content; the message names it."""

    exit_code = 65


class StoreLost(StoreFailure):
    """A newer coordinator holds the lease, so this one must not write."""

    exit_code = 75


class StoreDead(StoreFailure):
    """Reading or writing the store's file failed."""

    exit_code = 74
