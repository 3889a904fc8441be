"""Checks what is at the paths of the service's own files, before anything is opened.

A folder, a pipe, or a dangling link at the path of a file is reported with the next step. Opening it
would give a worse error, or block forever.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from shardyard_coordinator.store.failures import PlaceTaken


def check_own_files(paths: Iterable[Path], *, read_only: Iterable[Path] = ()) -> None:
    """Each is a file that this account reads and writes (of `read_only`: reads), or is not there at all.

    Links to files are followed. Raises: PlaceTaken; OSError if the file system is read-only or does not answer.
    """
    for path in paths:
        _check(path, os.R_OK | os.W_OK)
    for path in read_only:
        _check(path, os.R_OK)


def _check(path: Path, rights: int) -> None:
    if not os.path.lexists(path):
        return
    if what := _not_a_file(path):
        raise PlaceTaken(
            f"{path} {what}, and a file of the service belongs there: move it away (or put the file back) and start "
            "again"
        )
    if os.access(path, rights):
        return
    if rights & os.W_OK and os.statvfs(path).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    found = path.stat()
    raise PlaceTaken(
        f"{path} belongs to the account {found.st_uid} (mode {stat.S_IMODE(found.st_mode):04o}), and this one, "
        f"{os.geteuid()}, may not {'write' if rights & os.W_OK else 'read'} it; start the service as that account, or "
        "change the file's owner"
    )


def _not_a_file(path: Path) -> str:
    """What is at the path instead of a file; empty for a file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"is a link to {str(path.readlink())!r}, which is not there"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return f"is a link to {str(path.readlink())!r}, which leads back to it"
    if stat.S_ISREG(mode):
        return ""
    return "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
