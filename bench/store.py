"""Durable submissions on PostgreSQL beside SQLite: `CreateJob` from 64 callers, in turns on two services.

    python bench/store.py [--seconds 10] [--write]

Both are whole coordinators over a scripted cluster (`submit_server.py`), on the same disk; every acknowledged job is on
it. PostgreSQL is a private server on this machine with its own defaults, so its processes use the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.postgres import postgres_server, why_not
from measure import quantile, report
from submit import CALLERS, CREATE, Load, call_from_many, read_address, requests

HERE = Path(__file__).resolve().parent
ROUNDS = 6
TARGET_RATIO = 0.8


def main() -> int:
    """Measure, print, and say by the exit code whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each store, in all")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="sy") as folder, postgres_server() as postgres:
        data = Path(folder) / "corpus.txt"
        data.write_text("Hello, my dog is cute.\n" * 100, encoding="utf-8")
        with (
            serving(Path(folder), "sqlite") as ours,
            serving(Path(folder), "other", postgres.database("bench")) as other,
        ):
            sqlite, on_postgres = asyncio.run(measure((ours, other), data, arguments.seconds))
    return judge(sqlite, on_postgres, write=arguments.write)


@contextlib.contextmanager
def serving(folder: Path, name: str, store: str = "") -> Iterator[tuple[str, int]]:
    """A service with its state in a folder of its own, and the data in the folder above; its address and process."""
    environment = {**os.environ, "SHARDYARD_STORE": store, "SHARDYARD_DATA_ROOTS": str(folder)}
    command = [sys.executable, HERE / "submit_server.py", folder / name]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        _, address = (read_address(server) for _ in range(2))
        yield address, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


async def measure(services: tuple[tuple[str, int], ...], data: Path, seconds: float) -> list[Load]:
    """The submissions of each service, made in turns."""
    make, loads = requests(data), []
    async with contextlib.AsyncExitStack() as stack:
        for address, _ in services:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            loads.append(Load(channel.unary_unary(CREATE), make))
            await loads[-1].call(make())
        for at in range(ROUNDS):
            turns = list(zip(loads, services, strict=True))
            for load, (_, pid) in turns if at % 2 else reversed(turns):
                await call_from_many(load, seconds / ROUNDS, psutil.Process(pid))
    return loads


def judge(sqlite: Load, postgres: Load, *, write: bool) -> int:
    """Print the table; 0 if the target was met."""
    ratio = postgres.rate / sqlite.rate
    rows = [
        (f"`CreateJob`, {CALLERS} callers, SQLite", "", f"{sqlite.rate:,.0f}/s"),
        ("the same, PostgreSQL on the same machine", "", f"{postgres.rate:,.0f}/s"),
        ("PostgreSQL ÷ SQLite", f"at least {TARGET_RATIO}", f"{ratio:.2f}"),
        ("p99", "", ", ".join(f"{quantile(each.took, 0.99) * 1000:.0f} ms" for each in (sqlite, postgres))),
        ("the service's CPU a call", "", ", ".join(f"{each.cpu_us:.0f} µs" for each in (sqlite, postgres))),
    ]
    report("store", rows, write=write)
    return int(ratio < TARGET_RATIO)


if __name__ == "__main__":
    sys.exit(main())
