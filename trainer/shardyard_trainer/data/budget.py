"""The cache's budget for tokenised data: removes what was used longest ago, never what a process is reading.

Every plan leaves its tokens in the cache, so that the job finds them. Nothing is lost with them: the next process
that needs them makes them again. A process that reads a folder holds a lock on it until it ends, a rank for as long as
its job lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from shardyard_trainer.data.store import build_once, is_whole, locked, open_locked, sweep

BUDGET_VARIABLE = "SHARDYARD_TOKEN_CACHE_BYTES"
DEFAULT_BUDGET_BYTES = 32 * 1024**3
_KINDS = (
    *("examples", "corpora", "tagged", "pictures", "histories", "questions", "chats", "sequences", "sentences"),
    "torch_hub",
)
_UNBUDGETED = ("tokenizers",)
_HELD: dict[Path, BinaryIO] = {}


def tokenised(folder: Path, build: Callable[[Path], Any]) -> Path:
    """Like `build_once`, for a folder `{cache}/{kind}/{name}`, and keeps it in use until this process ends."""
    _hold(folder)
    was_there = folder.exists()
    build_once(folder, build)
    os.utime(folder)
    if not was_there:
        evict(folder.parent.parent, most_bytes=int(os.environ.get(BUDGET_VARIABLE, DEFAULT_BUDGET_BYTES)))
    return folder


def in_use(folder: Path) -> bool:
    """Whether a folder of `tokenised` exists and is complete; if so, keeps it in use until this process ends."""
    if not is_whole(folder):
        return False
    _hold(folder)
    if not is_whole(folder):  # removed in the meantime
        return False
    os.utime(folder)
    return True


def evict(cache: Path, *, most_bytes: int) -> list[Path]:
    """Removes folders until the rest fits, the least recently used first, and returns those it removed.

    What killed processes have left goes first, whatever the budget is.
    """
    for kind in (*_KINDS, *_UNBUDGETED):
        sweep(cache / kind)
        for gone in (cache / kind).glob(".*.gone"):
            shutil.rmtree(gone, ignore_errors=True)
        for lock in (cache / kind).glob(".*.use"):
            if not (folder := lock.with_name(lock.name[1:].removesuffix(".use"))).exists():
                _give_up(folder)
    folders = [
        path
        for kind in _KINDS
        if (cache / kind).is_dir()
        for path in (cache / kind).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    ]
    sizes = {folder: _size(folder) for folder in folders}
    held, given_up = sum(sizes.values()), []
    for folder in sorted(folders, key=_used_at):
        if held <= most_bytes:
            break
        if _give_up(folder):
            held -= sizes[folder]
            given_up.append(folder)
    return given_up


def _hold(folder: Path) -> None:
    """Kept open on purpose: the kernel releases the lock with the process, however that ends."""
    if folder in _HELD:
        return
    if folder.parent.name not in _KINDS:
        raise ValueError(f"{folder.parent.name} is not one of {_KINDS}: it would never be given up")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _HELD[folder] = open_locked(_lock_of(folder), fcntl.LOCK_SH)


def _give_up(folder: Path) -> bool:
    """Removes a folder and its lock; False if a process is reading it or it cannot be removed."""
    gone = folder.with_name(f".{folder.name}.gone")
    with (
        contextlib.suppress(OSError),  # BlockingIOError among them: a process is reading it.
        locked(_lock_of(folder), fcntl.LOCK_EX | fcntl.LOCK_NB) as lock,
    ):
        shutil.rmtree(gone, ignore_errors=True)
        if folder.exists():
            # Renamed first, so that no process finds a folder that is half removed.
            folder.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
        lock.unlink(missing_ok=True)
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
