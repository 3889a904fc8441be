"""The memory that the service's own processes take of their machine, which its jobs cannot have."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterator

import psutil

RESERVED_BYTES = 768 << 20
"""At least: the coordinator, the compute process and the server of warm ranks, about 600 MB, and an inspection.

A plan in which nothing of this has grown is then the same at any moment.
"""

_STEP_BYTES = 256 << 20
_MEASURED_EVERY_S = 10.0


def measured_bytes(ranks: Collection[int]) -> int:
    """What this process, and what it has started for itself, hold now."""
    return sum(_own_part_bytes(each) for each in _processes(ranks))


class ServiceMemory:
    """What the service takes now, in steps of 256 MiB, so that plans do not change with every page.

    Models that answer count as long as they are loaded. Pages that processes share count once.
    """

    def __init__(self, measure: Callable[[Collection[int]], int] = measured_bytes) -> None:
        self._measure = measure
        self._measured_s = float("-inf")
        self._bytes = RESERVED_BYTES

    async def reserved_bytes(self, ranks: Collection[int], *, now_s: float) -> int:
        """Bytes, measured at most every ten seconds; `ranks` are the process ids of jobs, which do not count."""
        if now_s - self._measured_s >= _MEASURED_EVERY_S:
            self._measured_s = now_s
            measured = await asyncio.to_thread(self._measure, ranks)
            self._bytes = max(RESERVED_BYTES, -(-measured // _STEP_BYTES) * _STEP_BYTES)
        return self._bytes


def _processes(ranks: Collection[int]) -> Iterator[psutil.Process]:
    """This process and what it has started for itself. Ranks and their keepers are in sessions of their own."""
    own = psutil.Process()
    yield own
    sessions = {each.pid for each in own.children() if each.pid not in ranks} | {os.getsid(0)}
    yield from (each for each in own.children(recursive=True) if each.pid not in ranks and _session(each) in sessions)


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return 0


def _own_part_bytes(process: psutil.Process) -> int:
    """Resident bytes of a process, its part alone of pages that others have too; 0 if it is gone."""
    try:
        try:
            found = process.memory_full_info()
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
        return int(getattr(found, "pss", found.uss))
    except psutil.Error:
        return 0
