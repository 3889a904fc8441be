"""Large numbers: 100,000 jobs, 1,000,000 events, 1,250 nodes of 8 GPUs, 1,000 gangs, 500 quiet followers.

    python bench/scale.py [--jobs 100000] [--write]

Each part is measured beside what it replaced, in the same run if that still exists: the policy without its
memos, lists over the indices of the first version, lists in the readers of single jobs, a check of a file that is not
in memory, curves point by point. The cluster is the tests' scripted one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import scale_gangs
import scale_store
from helpers.plain_curves import plain_downsample, plain_one_curve
from helpers.plain_policy import plain_admit
from measure import quantile, report
from shardyard_coordinator.control.storage_claim import claim_storage
from shardyard_coordinator.domain.records import Condition, MetricPoint
from shardyard_coordinator.scheduling.policy import NodeInfo, PendingJob, Policy, RunningJob, Snapshot, admit
from shardyard_coordinator.seams import NullTrace, SystemClock
from shardyard_coordinator.store import attempts, curves, jobs, listing, metrics
from shardyard_coordinator.store.store import Store, open_store

Row = tuple[str, str, str]
NODES, GPUS = 1250, 8
PLAIN_JOBS = 500
LISTS: list[tuple[str, str, list[Condition]]] = [
    ("of a state", "job.state = 'FAILED'", [Condition("state", "=", "FAILED")]),
    ("of a state that nobody is in", "job.state = 'PAUSED'", [Condition("state", "=", "PAUSED")]),
    (
        "of a label",
        "EXISTS (SELECT 1 FROM label l WHERE l.job_uid = job.uid AND l.key = 'sweep' AND l.value = 's-3')",
        [Condition("labels.sweep", "=", "s-3")],
    ),
    ("of a priority that few have", "job.priority = 4", [Condition("priority", "=", 4)]),
    ("ended since a time", f"job.end_us > {1 << 60}", [Condition("end_time", ">", 1 << 60)]),
    ("with a word in the name", "lower(display_name) LIKE '%zzz%'", [Condition("display_name", ":", "zzz")]),
]


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--part", type=int, help="only this one, from 0")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    count = arguments.jobs
    with tempfile.TemporaryDirectory(prefix="sy-scale") as name:
        folder = Path(name)
        parts = (
            lambda: admitting(count),
            lambda: asyncio.run(freed(folder / "line", count // 5)),
            lambda: asyncio.run(freed(folder / "long-line", count)),
            lambda: asyncio.run(lists(folder / "lists", count)),
            lambda: starting(folder / "cold", count),
            history,
            lambda: asyncio.run(scale_gangs.events(folder / "gangs", count // 100)),
            lambda: asyncio.run(scale_gangs.followers(folder / "followers", count // 200)),
        )
        rows, missed = [], 0
        for part in parts if arguments.part is None else parts[arguments.part : arguments.part + 1]:
            made, met = part()
            rows += made
            missed += not met
    report("scale", rows, write=arguments.write)
    return int(missed > 0)


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median time of that many runs."""
    took = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def ms(value_s: float) -> str:
    """Milliseconds in words."""
    return f"{value_s * 1000:,.2f} ms" if value_s < 0.01 else f"{value_s * 1000:,.0f} ms"


def admitting(count: int) -> tuple[list[Row], bool]:
    """A decision about the whole line on a cluster with one free node, beside the policy without its memos."""
    nodes = tuple(NodeInfo(f"node-{at:04}", GPUS, "gpu") for at in range(NODES))
    busy = tuple(RunningJob(f"r{at}", 1, ((node.id, GPUS),), 1) for at, node in enumerate(nodes[1:]))
    line = tuple(PendingJob(f"p{at}", at, 0, ((16, 8, 4, 2)[at % 4],), 1, "gpu") for at in range(count))
    snapshot, few = Snapshot(line, busy, nodes), Snapshot(line[:PLAIN_JOBS], busy, nodes)
    if admit(few, 0, Policy()) != plain_admit(few, 0, Policy()):
        raise AssertionError("the memos change an answer")
    ours_s, plain_s = seconds(lambda: admit(snapshot, 0, Policy()), 3), seconds(lambda: plain_admit(few, 0, Policy()))
    all_plain_s = plain_s * count / PLAIN_JOBS
    rows = [
        (f"Deciding about {count:,} jobs that wait, on {NODES:,} nodes", "under 2 s", f"{ours_s:.2f} s"),
        (f"the same job by job ({PLAIN_JOBS} measured, times {count // PLAIN_JOBS})", "", f"{all_plain_s:.0f} s"),
    ]
    return rows, ours_s < 2


async def freed(folder: Path, count: int) -> tuple[list[Row], bool]:
    """How long GPUs idle that come free behind a line, and how large the write-ahead log becomes meanwhile."""
    took, wal_bytes, loop_share = await scale_gangs.freed(folder, count, nodes=NODES, gpus=GPUS)
    rows = [
        (
            f"A GPU comes free behind {count:,} jobs: until the next attempt is recorded, median (worst)",
            "under 1 s" if count <= 20_000 else "",
            f"{ms(statistics.median(took))} ({ms(max(took))})",
        ),
        ("the write-ahead log meanwhile; the process's CPU", "", f"{wal_bytes / 2**20:.0f} MiB; {loop_share:.0%}"),
    ]
    return rows, count > 20_000 or max(took) < 1


async def lists(folder: Path, count: int) -> tuple[list[Row], bool]:
    """Pages of 50 by filter, beside the first version's indices; one job while sixteen lists are read."""
    database = await filled(folder, scale_store.Size(ended=count - 1000, queued=500, running=500))
    old = folder / "old.db"
    shutil.copyfile(database, old)
    before = as_in_the_first_version(old)
    store = await open_store(database, SystemClock(), NullTrace())
    rows, worst_s = [], 0.0
    try:
        for name, where, conditions in LISTS:
            page = lambda conn, c=conditions: seconds(lambda: listing.list_jobs(conn, "default", conditions=c), 5)  # noqa: E731
            ours_s = await store.read_many(page)
            old_s = seconds(lambda where=where: before.execute(OLD_PAGE.format(where=where)).fetchall(), 3)
            worst_s = max(worst_s, ours_s)
            measured = f"{ms(ours_s)} (before: {ms(old_s)})"
            rows.append((f"A page of 50 of {count:,} jobs {name}", "under 25 ms", measured))
        live_s = await store.read(lambda conn: seconds(lambda: attempts.held_slots(conn), 5))
        old_s = seconds(lambda: before.execute("SELECT * FROM attempt WHERE state != 'ENDED'").fetchall(), 3)
        rows.append(("What the 500 live attempts hold", "", f"{ms(live_s)} (before: {ms(old_s)})"))
        beside, mixed = await one_job_beside_lists(store, apart=True), await one_job_beside_lists(store, apart=False)
        rows.append(
            ("`GetJob`'s read while 16 lists are read, p99 (in the same threads)", "", f"{ms(beside)} ({ms(mixed)})")
        )
    finally:
        await store.close()
        before.close()
    return rows, worst_s < 0.05


OLD_PAGE = """
    SELECT * FROM job WHERE project = 'default' AND deleted_us = 0 AND {where} ORDER BY create_us DESC, id DESC LIMIT 50
"""
OLD_INDICES = """
    SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name IN ('job', 'attempt', 'label')
"""


def as_in_the_first_version(database: Path) -> sqlite3.Connection:
    """A copy of the store with the indices that the first version had."""
    conn = sqlite3.connect(database)
    for (name,) in conn.execute(OLD_INDICES).fetchall():
        conn.execute(f"DROP INDEX {name}")
    conn.execute("CREATE INDEX job_line ON job (state, deleted_us, priority, id, not_before_us, pending)")
    conn.execute("CREATE INDEX job_by_create ON job (project, create_us, id)")
    conn.execute("CREATE INDEX label_by_value ON label (key, value)")
    conn.execute("CREATE INDEX attempt_by_state ON attempt (state)")
    return conn


async def one_job_beside_lists(store: Store, *, apart: bool) -> float:
    """The 99th percentile of reading one job while 16 callers read the slowest list, in threads of their own or not."""
    read, going = (store.read_many if apart else store.read), [True]
    slow = [Condition("labels.team", ":", "*")]

    async def lister() -> None:
        while going[0]:
            await read(lambda conn: listing.list_jobs(conn, "default", conditions=slow))

    listers = [asyncio.create_task(lister()) for _ in range(16)]
    took = []
    for at in range(200):
        begun = time.perf_counter()
        await store.read(lambda conn, at=at: jobs.get_job_by_uid(conn, scale_store.uid_of(at)))
        took.append(time.perf_counter() - begun)
    going[0] = False
    await asyncio.gather(*listers)
    return quantile(took, 0.99)


def starting(folder: Path, count: int) -> tuple[list[Row], bool]:
    """A start with a file that is not in memory: until the port answers, until the service serves."""
    size = scale_store.Size(ended=count, num_events=10 * count)
    database = asyncio.run(filled(folder, size))
    forget(database)
    with sqlite3.connect(database) as conn:
        check_s = seconds(lambda: conn.execute("PRAGMA quick_check(1)").fetchone())
    conn.close()
    forget(database)
    port_s, serving_s = scale_gangs.start(folder)
    what = f"A cold start with {size.num_events:,} events ({database.stat().st_size / 2**20:.0f} MiB)"
    rows = [
        (f"{what}: until the port answers NOT_SERVING", "", f"{port_s:.1f} s"),
        ("until it serves", "under 5 s", f"{serving_s:.1f} s"),
        ("the check of the file alone, not read in order before", "", f"{check_s:.1f} s"),
    ]
    return rows, serving_s < 5


def forget(file: Path) -> None:
    """Takes a file out of the memory of the system."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def history() -> tuple[list[Row], bool]:
    """A curve of 100,000 steps cut down to 1,000 points, from packed blocks, beside the same point by point."""
    points = [MetricPoint(1, step, step, 1 / (step + 1)) for step in range(100_000)]
    blocks = [(1, metrics._pack(points[at : at + 1000])) for at in range(0, len(points), 1000)]

    def plain() -> list[MetricPoint]:
        unpacked = [MetricPoint(1, *each) for _, data in blocks for each in metrics._POINT.iter_unpack(data)]
        return plain_downsample(plain_one_curve(unpacked), 1000)

    def ours() -> list[MetricPoint]:
        return list(curves.downsample(curves.one_curve(curves.unpack(blocks)), 1000).points())

    if ours() != plain():
        raise AssertionError("the arrays change an answer")
    ours_s, plain_s = seconds(ours, 5), seconds(plain, 3)
    rows = [("100,000 points as a curve of 1,000 (point by point)", "under 20 ms", f"{ms(ours_s)} ({ms(plain_s)})")]
    return rows, ours_s < 0.02


async def filled(folder: Path, size: scale_store.Size) -> Path:
    """A store with so much in it, and the storage that it has claimed."""
    database = folder / "store.db"
    store = await open_store(database, SystemClock(), NullTrace())
    await claim_storage(folder / "storage", store)
    await store.close()
    scale_store.fill(database, size)
    return database


if __name__ == "__main__":
    sys.exit(main())
