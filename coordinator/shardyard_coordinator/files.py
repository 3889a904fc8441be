"""The service's own files: what is looked at before it starts, and what is said if one cannot be used."""

from __future__ import annotations

import errno
import os
from typing import Final

from shardyard_coordinator.control.own_files import check_own_files
from shardyard_coordinator.launch.claim import CLAIM
from shardyard_coordinator.serve.first_admin import FILE
from shardyard_coordinator.settings import Settings

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk."""


def look_at_files(settings: Settings) -> None:
    """Raises: PlaceTaken, OSError if something else is at the path of one of the service's own files."""
    state, storage = settings.state_dir.absolute(), settings.storage
    database = settings.database
    names = (
        "coordinator.json",
        "coordinator.tmp",
        "compute.log",
        "http.log",
        "ray-agent.log",
        "ray.json",
        "ray.token",
        FILE,
        f"{FILE}.tmp",
    )
    beside = [database.with_name(database.name + suffix) for suffix in ("", "-wal", "-shm", ".lock")]
    ours = [*beside, *(state / name for name in names), storage / f"{CLAIM}.tmp", storage / "compute.log"]
    check_own_files(ours, read_only=[storage / CLAIM])


def in_words(error: OSError, settings: Settings) -> str:
    """The error with its folder and the next step."""
    where = error.filename or f"the state directory {settings.state_dir}, or the storage {settings.storage}"
    others = "or choose other folders with --state-dir and --storage-root"
    if error.errno in FULL:
        return f"{where}: no space is left; free some and start again, {others}"
    if error.errno == errno.EROFS:
        return f"{where}: the file system is read-only; mount it so that it can be written, {others}"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{where}: it is in the place of a folder; move it away, {others}"
    if error.errno == errno.ELOOP:
        return f"{where}: a link on the way leads back to itself; remove it, {others}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{where}: this account, {os.geteuid()}, has no right to it; give it that right, {others}"
    if error.filename:
        return f"{where}: {error.strerror}; check its disk and its mount, then start again, {others}"
    return str(error)
