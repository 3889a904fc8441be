"""The counters of memory groups as the kernel writes them, and a rank that the kernel really ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers.memory_groups import limited_group
from helpers.repository import ROOT
from shardyard_coordinator.launch.memory import MemoryWatch, OutOfMemory, monitored, usable_bytes
from shardyard_coordinator.launch.rank_process import _how_ended

LIMIT = 600 << 20
EVENTS = "low 0\nhigh 0\nmax 31\noom 1\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"

TREES = {
    "version 2": (
        "0::/a.slice/b.scope\n",
        "a.slice/b.scope/memory.events",
        EVENTS,
        {"a.slice/b.scope/memory.peak": "1000", "a.slice/b.scope/memory.max": "max", "a.slice/memory.max": "2000"},
        OutOfMemory(1000, 2000),
    ),
    "a container that sees its own group at the top": (
        "0::/\n",
        "memory.events",
        EVENTS,
        {"memory.peak": "900", "memory.max": "1000"},
        OutOfMemory(900, 1000),
    ),
    "version 1, by the path of the host": (
        "11:memory:/docker/0123\n0::/\n",
        "memory/memory.oom_control",
        CONTROL,
        {"memory/memory.max_usage_in_bytes": "500", "memory/memory.limit_in_bytes": "512"},
        OutOfMemory(500, 512),
    ),
    "no limit but the machine": (
        "0::/user.slice\n",
        "user.slice/memory.events",
        EVENTS,
        {"user.slice/memory.max": "max"},
        OutOfMemory(0, psutil.virtual_memory().total),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_a_container_has_the_memory_of_its_limit(tmp_path: Path, name: str) -> None:
    membership, counter, text, files, expected = TREES[name]
    _write(tmp_path / f"proc/{os.getpid()}/cgroup", membership)
    for path, content in {**files, counter: text.format(0)}.items():
        _write(tmp_path / "sys/fs/cgroup" / path, content)
    assert usable_bytes(root=tmp_path) == expected.limit_bytes


@pytest.mark.parametrize("name", TREES)
def test_a_kill_is_one_that_was_counted_since_and_has_the_smallest_limit(tmp_path: Path, name: str) -> None:
    membership, counter, text, files, expected = TREES[name]
    _write(tmp_path / "proc/7/cgroup", membership)
    for path, content in {**files, counter: text.format(3)}.items():
        _write(tmp_path / "sys/fs/cgroup" / path, content)
    watch = MemoryWatch.of(7, root=tmp_path)
    assert watch.out_of_memory() is None
    _write(tmp_path / "sys/fs/cgroup" / counter, text.format(4))
    assert watch.out_of_memory() == expected


def test_without_a_group_the_machines_own_counter_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "proc/vmstat", "pgfault 10\noom_kill 5\n")
    watch = MemoryWatch.of(7, root=tmp_path)
    assert watch.out_of_memory() is None
    _write(tmp_path / "proc/vmstat", "pgfault 10\noom_kill 6\n")
    assert watch.out_of_memory() == OutOfMemory(0, psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("code", "is_out"), [(-signal.SIGKILL, True), (137, True), (-signal.SIGTERM, False), (0, False), (1, False)]
)
def test_only_a_killed_process_is_explained_by_memory(tmp_path: Path, code: int, is_out: bool) -> None:
    _write(tmp_path / "proc/vmstat", "oom_kill 0\n")
    watch = MemoryWatch.of(7, root=tmp_path)
    _write(tmp_path / "proc/vmstat", "oom_kill 1\n")
    assert (_how_ended(code, watch).memory is not None) == is_out


def test_a_rank_that_the_kernel_ends_for_want_of_memory_is_reported_with_peak_and_limit(tmp_path: Path) -> None:
    with limited_group(LIMIT) as group:
        done = subprocess.run(
            [sys.executable, "-m", "helpers.oom_run", str(tmp_path), str(group)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["reason"], report["rank"]) == ("HOST_OOM", 1)
    assert "rank 1 was killed by the system, which ran out of memory" in report["message"]
    assert "the limit is 0.59 GiB" in report["message"]
    assert int(report["metadata"]["limit_bytes"]) == LIMIT
    assert LIMIT // 2 < int(report["metadata"]["peak_bytes"]) <= LIMIT


def test_what_rays_memory_monitor_says_is_read() -> None:
    found = monitored(
        "Task was killed due to the node running low on memory.\nOOM kill reason: Memory usage 2512080896B exceeded "
        "threshold of 252765104B (1.0% of 25276510208B limit)\n"
    )
    assert found is not None
    assert found.metadata == {"peak_bytes": "2512080896", "limit_bytes": "252765104"}
    assert found.words == "2.34 GiB were held by all processes of its node, the limit is 0.24 GiB"
    assert monitored("Memory on the node was low") is None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
