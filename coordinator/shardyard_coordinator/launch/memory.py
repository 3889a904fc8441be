"""Whether the kernel has killed a process because memory ran out: by the counters of its cgroup, or of the machine.

Only a change of the counter counts, so it is read when a process starts and again when it is gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# The exit code that a shell or a container's runtime gives for a process that was ended by SIGKILL.
EXIT_KILLED = 137

_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class OutOfMemory:
    """Facts about the kill. `peak_bytes` is the maximum of the group, 0 if not known.

    `by` killed the process; `holder` held the memory, if it is more than the process's own group.
    """

    peak_bytes: int
    limit_bytes: int
    by: str = "the system, which ran out of memory"
    holder: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """Peak and limit as metadata of a failure report."""
        peak = {"peak_bytes": str(self.peak_bytes)} if self.peak_bytes else {}
        return {**peak, "limit_bytes": str(self.limit_bytes)}

    @property
    def words(self) -> str:
        """Peak and limit in words, for people."""
        by = f" by {self.holder}" if self.holder else ""
        held = f"{_gib(self.peak_bytes)} GiB were held{by}, " if self.peak_bytes else ""
        return f"{held}the limit is {_gib(self.limit_bytes)} GiB"


@dataclass(frozen=True)
class MemoryWatch:
    """The kills that the memory group of a process had counted when it was first read; it can be pickled."""

    group: Path | None
    kills: int
    root: Path = Path("/")

    @classmethod
    def of(cls, pid: int, *, root: Path = Path("/")) -> MemoryWatch:
        """Starts watching a running process; `root` is the folder of `proc` and `sys`."""
        group = _group_of(pid, root)
        return cls(group, _kills(group, root), root)

    def out_of_memory(self) -> OutOfMemory | None:
        """The kill with the group's limits, if the group has lost a process since; None if it has not."""
        if _kills(self.group, self.root) <= self.kills:
            return None
        peak = max((_number(self.group / name) for name in _PEAKS), default=0) if self.group is not None else 0
        return OutOfMemory(peak, _limit(self.group))


def usable_bytes(*, root: Path = Path("/")) -> int:
    """Memory that this process and what it starts may have: the machine's, or less in a container with a limit."""
    return min(_limit(_group_of(os.getpid(), root)), psutil.virtual_memory().total)


def monitored(text: str) -> OutOfMemory | None:
    """The kill that Ray's memory monitor reports: the memory held on the node, and its threshold."""
    found = _MONITOR.search(text)
    if found is None:
        return None
    return OutOfMemory(int(found[1]), int(found[2]), "the cluster's own memory monitor", "all processes of its node")


_MONITOR = re.compile(r"Memory usage (\d+)B exceeded threshold of (\d+)B")
_PEAKS = ("memory.peak", "memory.max_usage_in_bytes")
_COUNTERS = ("memory.events", "memory.oom_control")


def _group_of(pid: int, root: Path) -> Path | None:
    """The folder of the nearest cgroup with memory counters; a container may see its own at the top."""
    for mount, path in _memberships(pid, root):
        folder = mount / path.lstrip("/")
        for each in (folder, *folder.parents):
            if any((each / name).is_file() for name in _COUNTERS):
                return each
            if each == mount:
                break
    return None


def _memberships(pid: int, root: Path) -> Iterator[tuple[Path, str]]:
    """(mount of the hierarchy, the group's path in it), version 1 first, because it has the memory if both exist."""
    try:
        lines = (root / "proc" / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys" / "fs" / "cgroup"
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    yield from ((mount / "memory", path) for _, kinds, path in fields if "memory" in kinds.split(","))
    yield from ((mount, path) for number, kinds, path in fields if number == "0" and not kinds)


def _limit(group: Path | None) -> int:
    """The lowest limit of a group and those above it; the machine's memory if there is none."""
    groups = [] if group is None else [group, *group.parents]
    limits = [_number(each / name) for each in groups for name in ("memory.max", "memory.limit_in_bytes")]
    return min((limit for limit in limits if 0 < limit < _UNLIMITED), default=psutil.virtual_memory().total)


def _kills(group: Path | None, root: Path) -> int:
    """Kills counted by the cgroup; by the whole machine if no cgroup counts."""
    if group is None:
        return _counted(root / "proc" / "vmstat")
    return max(_counted(group / name) for name in _COUNTERS)


def _counted(path: Path) -> int:
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in words if line[:1] == ["oom_kill"] and len(line) == 2), 0)


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0  # `max`: unlimited.


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f}"
