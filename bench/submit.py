"""Durable submissions: `CreateJob` from 64 callers, beside an RPC that does nothing and passes the same interceptors.

    python bench/submit.py [--seconds 10] [--write]

Both are measured in turns on one server process; each acknowledged job is on disk (SQLite, WAL, synchronous=FULL).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from measure import quantile, report
from shardyard.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc, server_service_pb2, server_service_pb2_grpc

HERE = Path(__file__).resolve().parent
CALLERS = 64
ROUNDS = 4
TARGET_RATE, TARGET_P99_S, TARGET_RATIO = 1000.0, 0.150, 0.5
ADDRESS = re.compile(r"serves on (\S+?);")


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind of call, in all")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy") as folder:
        data = Path(folder) / "corpus.txt"
        data.write_text("Hello, my dog is cute.\n" * 100, encoding="utf-8")
        server = subprocess.Popen(
            [sys.executable, HERE / "submit_server.py", folder], stdout=subprocess.PIPE, text=True
        )
        try:
            line = server.stdout.readline() if server.stdout else ""
            found = ADDRESS.search(line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            cold_s, jobs, nothing = asyncio.run(measure(found[1], data, arguments.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    return judge(cold_s, jobs, nothing, arguments.seconds, write=arguments.write)


async def measure(address: str, data: Path, seconds: float) -> tuple[float, list[float], list[float]]:
    """Seconds of the first submission, and of every call of both kinds."""
    async with grpc.aio.insecure_channel(address) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        server = server_service_pb2_grpc.ServerServiceStub(channel)

        async def create() -> Any:
            return await jobs.CreateJob(request(data))

        async def nothing() -> Any:
            return await server.GetServerInfo(server_service_pb2.GetServerInfoRequest())

        started = time.perf_counter()
        await create()
        cold_s = time.perf_counter() - started
        submissions: list[float] = []
        others: list[float] = []
        for _ in range(ROUNDS):
            others += await call_from_many(nothing, seconds / ROUNDS)
            submissions += await call_from_many(create, seconds / ROUNDS)
    return cold_s, submissions, others


async def call_from_many(call: Callable[[], Awaitable[Any]], seconds: float) -> list[float]:
    """The seconds that each call took, from so many callers that each wait for their answer."""
    end = time.perf_counter() + seconds
    took: list[float] = []

    async def caller() -> None:
        while (started := time.perf_counter()) < end:
            await call()
            took.append(time.perf_counter() - started)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return took


def request(data: Path) -> job_service_pb2.CreateJobRequest:
    """A job as a client sends it; all of them the same, but for the request id."""
    job = job_pb2.Job(display_name="bench")
    job.spec.pretraining.causal_lm.SetInParent()
    job.spec.model.architecture.model_type = "gpt2"
    job.spec.tokenizer.train.vocab_size = 4096
    job.spec.train_data.uri = str(data)
    job.spec.optimization.max_steps = 100
    return job_service_pb2.CreateJobRequest(parent="projects/default", job=job, request_id=str(uuid.uuid4()))


def judge(cold_s: float, jobs: list[float], nothing: list[float], seconds: float, *, write: bool) -> int:
    """Print the table; 0 where every target was met."""
    rate, other = len(jobs) / seconds, len(nothing) / seconds
    p99 = quantile(jobs, 0.99)
    rows = [
        (f"`CreateJob`, {CALLERS} callers", f"at least {TARGET_RATE:,.0f}/s", f"{rate:,.0f}/s"),
        ("its p99", f"under {TARGET_P99_S * 1000:.0f} ms", f"{p99 * 1000:.0f} ms"),
        ("its median", "", f"{statistics.median(jobs) * 1000:.0f} ms"),
        ("an RPC that does nothing, same interceptors", "", f"{other:,.0f}/s"),
        ("`CreateJob` ÷ that", f"at least {TARGET_RATIO}", f"{rate / other:.2f}"),
        ("the first submission, with the inspection by a scripted worker", "", f"{cold_s * 1000:.0f} ms"),
    ]
    report("submit", rows, write=write)
    return int(rate < TARGET_RATE or p99 >= TARGET_P99_S or rate / other < TARGET_RATIO)


if __name__ == "__main__":
    sys.exit(main())
