"""Tokenised data in the cache has a budget: what was used longest ago is given up, never what a process reads.

Every plan leaves its tokens in the cache, so that the job finds them. Nothing is lost with them: whoever needs them
makes them again. A process that reads a folder holds a lock on it until it ends, a rank for as long as its job lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from shardyard_trainer.data.store import build_once

BUDGET_VARIABLE = "SHARDYARD_TOKEN_CACHE_BYTES"
DEFAULT_BUDGET_BYTES = 32 * 1024**3
_KINDS = ("examples", "corpora")
_HELD: dict[Path, BinaryIO] = {}


def tokenised(folder: Path, build: Callable[[Path], Any]) -> Path:
    """As `build_once`, for a folder `{cache}/{kind}/{name}`; it is used from now until this process ends."""
    _hold(folder)
    was_there = folder.exists()
    build_once(folder, build)
    os.utime(folder)
    if not was_there:
        evict(folder.parent.parent, most_bytes=int(os.environ.get(BUDGET_VARIABLE, DEFAULT_BUDGET_BYTES)))
    return folder


def evict(cache: Path, *, most_bytes: int) -> list[Path]:
    """Gives up folders until the rest fits, the least recently used first; those that it gave up."""
    folders = [
        path
        for kind in _KINDS
        if (cache / kind).is_dir()
        for path in (cache / kind).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    ]
    sizes = {folder: _size(folder) for folder in folders}
    held, gone = sum(sizes.values()), []
    for folder in sorted(folders, key=_used_at):
        if held <= most_bytes:
            break
        if _give_up(folder):
            held -= sizes[folder]
            gone.append(folder)
    return gone


def _hold(folder: Path) -> None:
    """Kept open on purpose: the kernel lets go of the lock with the process, however it ends."""
    if folder in _HELD:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder).open("ab")
    fcntl.flock(lock, fcntl.LOCK_SH)
    _HELD[folder] = lock


def _give_up(folder: Path) -> bool:
    """Whether nobody reads it, and it is gone."""
    with _lock_of(folder).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        gone = folder.with_name(f".{folder.name}.gone")
        with contextlib.suppress(OSError):
            # At once out of the way: nobody finds it half removed.
            folder.replace(gone)
            shutil.rmtree(gone)
            return True
    return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.use")


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
