"""A store as it is after months: many jobs, most of them ended, and many events; made with few statements."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardyard.v1 import job_pb2, plan_pb2

ENDED = ("SUCCEEDED", "SUCCEEDED", "SUCCEEDED", "FAILED", "CANCELLED")
TASKS = ("causal_lm", "text_classification", "masked_lm", "feature_extraction")
DAY_US = 86_400_000_000
START_US = 1_780_000_000_000_000


@dataclass(frozen=True)
class Size:
    """How many jobs have ended, wait and run, and how many events the ended ones have in all."""

    ended: int
    queued: int = 0
    running: int = 0
    num_events: int = 0

    @property
    def jobs(self) -> int:
        """All of them."""
        return self.ended + self.queued + self.running


def fill(database: Path, size: Size, *, slots: Sequence[int] = (8, 4, 2, 1), gpus: bool = True) -> None:
    """Fills a closed store that has its tables. Queued jobs ask for these numbers of slots, in turns."""
    conn = sqlite3.connect(database)
    conn.execute("PRAGMA synchronous=OFF")
    with conn:
        _insert(conn, "job", _jobs(size, slots, gpus=gpus))
        _insert(conn, "label", _labels(conn, size))
        _insert(conn, "attempt", _attempts(size))
        _insert(conn, "event", _events(size))
    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    conn.close()


def uid_of(at: int) -> str:
    """The uid of the job at a place."""
    return f"{at:032x}"


def _insert(conn: sqlite3.Connection, table: str, rows: Iterator[dict[str, Any]]) -> None:
    first = next(rows, None)
    if first is None:
        return
    names, places = ", ".join(first), ", ".join(f":{name}" for name in first)
    conn.executemany(f"INSERT INTO {table} ({names}) VALUES ({places})", itertools.chain([first], rows))


def _state(at: int, size: Size) -> str:
    if at < size.ended:
        return ENDED[at % len(ENDED)]
    return "QUEUED" if at < size.ended + size.queued else "RUNNING"


def _jobs(size: Size, slots: Sequence[int], *, gpus: bool) -> Iterator[dict[str, Any]]:
    spec = job_pb2.Job(display_name="x" * 1500).SerializeToString()
    plan = (
        plan_pb2.JobPlan(total_steps=1000).SerializeToString()
        + job_pb2.Job(display_name="y" * 1500).SerializeToString()
    )
    progress = job_pb2.Progress(step=1000, total_steps=1000, loss=1.5).SerializeToString()
    for at in range(size.jobs):
        state = _state(at, size)
        create_us = START_US + at * 1_000_000
        workers = slots[at % len(slots)]
        yield {
            "uid": uid_of(at),
            "project": "default",
            "job_id": f"job-{at}",
            "display_name": f"sweep {at % 97}",
            "queue": "default",
            "priority": 2 if at % 50 else 3,
            "task": TASKS[at % 4],
            "creator": f"user-{at % 40}",
            "state": state,
            "spec": spec,
            "resolved_spec": spec,
            "plan": plan,
            "workers": workers,
            "gpus_per_worker": int(gpus),
            "epoch": int(state != "QUEUED"),
            "last_sequence": _events_of(at, size),
            "progress": progress if state != "QUEUED" else None,
            "pending": job_pb2.PendingInfo(
                constraint=job_pb2.PendingInfo.CONSTRAINT_INSUFFICIENT_SLOTS,
                message=f"needs {workers} slots, 0 free",
                needed_slots=workers,
                position=at - size.ended + 1,
            ).SerializeToString()
            if state == "QUEUED"
            else None,
            "create_us": create_us,
            "update_us": create_us,
            "waiting_us": create_us,
            "end_us": create_us + DAY_US if state in ENDED else 0,
        }


def _events_of(at: int, size: Size) -> int:
    return max(size.num_events // size.ended, 1) if at < size.ended else 1


def _labels(conn: sqlite3.Connection, size: Size) -> Iterator[dict[str, Any]]:
    # A store of an earlier version lacks these columns.
    full = "job_row" in {row[1] for row in conn.execute("PRAGMA table_info(label)")}
    for at in range(size.jobs):
        for key, value in (("team", f"team-{at % 5}"), ("sweep", f"s-{at // 100}")):
            row: dict[str, Any] = {"job_uid": uid_of(at), "key": key, "value": value}
            if full:
                row |= {"project": "default", "create_us": START_US + at * 1_000_000, "job_row": at + 1}
            yield row


def _attempts(size: Size) -> Iterator[dict[str, Any]]:
    for at in range(size.jobs):
        state = _state(at, size)
        if state != "QUEUED":
            node = f"node-{at % 1250}"
            yield {
                "job_uid": uid_of(at),
                "epoch": 1,
                "state": "ENDED" if state in ENDED else "ACTIVE",
                "workers": 1,
                "placement": json.dumps([[node, 1]]),
                "nodes": json.dumps([node]),
                "released": int(state in ENDED),
                "create_us": START_US,
            }


def _events(size: Size) -> Iterator[dict[str, Any]]:
    progress = job_pb2.JobEvent(progress=job_pb2.Progress(step=7, total_steps=1000, loss=1.25, tokens=70_000))
    payload = progress.SerializeToString()
    for at in range(size.jobs):
        for sequence in range(1, _events_of(at, size) + 1):
            yield {
                "job_uid": uid_of(at),
                "sequence": sequence,
                "time_us": START_US + at * 1_000_000,
                "attempt": 1,
                "kind": 5,
                "payload": payload,
            }
