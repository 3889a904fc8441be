"""Folders that only this account can use: no other account can read their content, whichever process made them.

The process's umask keeps new files private; this module checks those that exist already.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from shardyard_coordinator.store.failures import FolderShared

_OTHERS = 0o077


def make_private(folder: Path) -> None:
    """Makes the folder if it is missing, and revokes the rights of other accounts to it.

    Raises: FolderShared if it belongs to another account, or to everybody; OSError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if not found.st_mode & _OTHERS:
        return
    is_ours = found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX
    if is_ours:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
    if not is_ours or folder.stat().st_mode & _OTHERS:
        raise FolderShared(
            f"the folder {folder} can be read by other accounts (mode {stat.S_IMODE(found.st_mode):04o}, owner "
            f"{found.st_uid}), and this one, {os.geteuid()}, may not change that; give a folder that is this "
            f"account's own, such as {folder / 'shardyard'}, or revoke those rights: chmod 700 {folder}"
        )


def tighten(folder: Path, *, but: Path | None = None) -> int:
    """Revokes the rights of other accounts to everything below the folder, except below `but`; counts the changes.

    Links are not followed, and other file systems are left alone. What belongs to another account stays as it is:
    nobody else gets through the folder above it.
    """
    changed = 0
    device = folder.stat().st_dev
    for path, found in _below(folder, device, but):
        if found.st_mode & _OTHERS and found.st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
            changed += 1
    return changed


def _below(folder: Path, device: int, but: Path | None) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # Removed meanwhile, or another account's.
        return
    for entry in entries:
        path = Path(entry.path)
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if path == but or found.st_dev != device or not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
            continue
        yield path, found
        if stat.S_ISDIR(found.st_mode):
            yield from _below(path, device, but)
