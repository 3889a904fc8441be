"""Wakes the followers of a job's logs when its files have grown; one task looks for all followers of all jobs.

Files do not notify anybody when they grow, least of all on a storage that several nodes share. So while there are
followers, one thread polls the sizes of their jobs' files; a follower itself does nothing until it is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardyard_coordinator.serve.fanout import Fanout, logs_of

_LIST_ANEW = 20


class LogLooks:
    """Looks every `every_s` while there are followers."""

    def __init__(self, fanout: Fanout, every_s: float) -> None:
        self._fanout = fanout
        self._every_s = every_s
        self._jobs: dict[str, _Job] = {}
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def following(self, job_uid: str, folder: Path) -> Iterator[None]:
        """While inside, `logs_of(job_uid)` is woken when log files below the job's folder grow or appear."""
        job = self._jobs.setdefault(job_uid, _Job(folder))
        job.followers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            job.followers -= 1
            if not job.followers:
                self._jobs.pop(job_uid, None)

    async def _run(self) -> None:
        try:
            while self._jobs:
                jobs = dict(self._jobs)
                for uid in await asyncio.to_thread(_grown, jobs):
                    self._fanout.wake(logs_of(uid))
                await asyncio.sleep(self._every_s)
        finally:
            self._task = None


def _grown(jobs: Mapping[str, _Job]) -> list[str]:
    return [uid for uid, job in jobs.items() if job.has_grown()]


class _Job:
    """The log files of a job at the last look."""

    def __init__(self, folder: Path) -> None:
        self.followers = 0
        self._folder = folder
        self._looks = 0
        self._changed: tuple[int, ...] = ()
        self._folders: list[str] = []
        self._files: list[str] = []
        self._sizes: list[int] = []

    def has_grown(self) -> bool:
        """Whether anything has changed since the last look; true at the first one."""
        self._looks += 1
        # A file made in the same clock tick as a listing does not change the folder's time.
        changed = tuple(_time(each) for each in (str(self._folder), *self._folders))
        if changed != self._changed or self._looks % _LIST_ANEW == 1:
            self._list()
            self._changed = tuple(_time(each) for each in (str(self._folder), *self._folders))
        sizes = [_size(each) for each in self._files]
        grown = sizes != self._sizes or self._looks == 1
        self._sizes = sizes
        return grown

    def _list(self) -> None:
        names = _paths(str(self._folder))
        attempts = [path for name, path in names.items() if name[0] == "e" and name[1:].isdigit()]
        # The attempt's own folder is checked until it has its logs.
        logs = [f"{each}/logs" for each in attempts]
        self._folders = sorted([*attempts, *logs])
        self._files = sorted(path for folder in logs for name, path in _paths(folder).items() if name.endswith(".log"))


def _paths(folder: str) -> dict[str, str]:
    """The entries of a folder by name; empty if it is missing or its storage does not answer."""
    try:
        with os.scandir(folder) as found:
            return {each.name: each.path for each in found}
    except OSError:
        return {}


def _time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 - a path as text, many a second.
    except OSError:
        return 0


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size  # noqa: PTH116
    except OSError:
        return 0
