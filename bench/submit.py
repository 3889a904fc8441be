"""Durable submissions: `CreateJob` from 64 callers, beside an RPC that does nothing and passes the same interceptors.

    python bench/submit.py [--seconds 10] [--write]

The RPC that does nothing takes the same `CreateJobRequest` through the same guard, parsing and validation included, and
answers an empty Job; `Health.Check` is compared. All are measured in turns on one server process, from one client
that sends bytes made beforehand and does not read the answers; each acknowledged job is on disk (SQLite, WAL,
synchronous=FULL).
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil

from measure import quantile, report
from shardyard.v1 import job_pb2, job_service_pb2

HERE = Path(__file__).resolve().parent
CALLERS = 64
ROUNDS = 4
TARGET_RATE, TARGET_P99_S, TARGET_RATIO = 1000.0, 0.150, 0.5
ADDRESS = re.compile(r" on (\S+?);")
CREATE = "/shardyard.v1.JobService/CreateJob"
CHECK = "/grpc.health.v1.Health/Check"


@dataclass
class Load:
    """Calls of one kind: where to, with what, and what came out of it. CPU seconds are of the server's process."""

    call: grpc.aio.UnaryUnaryMultiCallable
    make: Callable[[], bytes]
    took: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.took) / self.wall_s

    @property
    def cpu_us(self) -> float:
        """Microseconds of the server's CPU a call."""
        return self.cpu_s / len(self.took) * 1e6


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
            nothing, address = (read_address(server) for _ in range(2))
            cold_s, *loads = asyncio.run(measure(address, nothing, data, server.pid, arguments.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    return judge(cold_s, *loads, write=arguments.write)


def read_address(server: subprocess.Popen[str]) -> str:
    """The address in the server's next line."""
    line = server.stdout.readline() if server.stdout else ""
    found = ADDRESS.search(line)
    if found is None:
        raise RuntimeError(f"the server did not start: {line!r}")
    return found[1]


async def measure(address: str, nothing: str, data: Path, pid: int, seconds: float) -> tuple[float, Load, Load, Load]:
    """Seconds of the first submission, then submissions, calls that do nothing, and checks of the health."""
    make = requests(data)
    async with grpc.aio.insecure_channel(address) as channel, grpc.aio.insecure_channel(nothing) as other:
        jobs = Load(channel.unary_unary(CREATE), make)
        loads = (jobs, Load(other.unary_unary(CREATE), make), Load(channel.unary_unary(CHECK), bytes))
        started = time.perf_counter()
        await jobs.call(make())
        cold_s = time.perf_counter() - started
        for _ in range(ROUNDS):
            for load in reversed(loads):
                await call_from_many(load, seconds / ROUNDS, psutil.Process(pid))
    return cold_s, *loads


async def call_from_many(load: Load, seconds: float, server: psutil.Process) -> None:
    """Calls from that many callers, each of which waits for its answers."""
    own, before, started = psutil.Process(), cpu_s(server), time.perf_counter()
    own_before, end = cpu_s(own), started + seconds

    async def caller() -> None:
        while (begun := time.perf_counter()) < end:
            await load.call(load.make())
            load.took.append(time.perf_counter() - begun)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    load.wall_s += time.perf_counter() - started
    load.cpu_s += cpu_s(server) - before
    load.client_cpu_s += cpu_s(own) - own_before


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that the process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def requests(data: Path) -> Callable[[], bytes]:
    """Makes the bytes of a job as a client sends it; identical except for the request id."""
    job = job_pb2.Job(display_name="bench")
    job.spec.pretraining.causal_lm.SetInParent()
    job.spec.model.architecture.model_type = "gpt2"
    job.spec.tokenizer.train.vocab_size = 4096
    job.spec.train_data.uri = str(data)
    job.spec.optimization.max_steps = 100
    same = job_service_pb2.CreateJobRequest(parent="projects/default", job=job).SerializeToString()

    def make() -> bytes:
        # Fields of a message may be appended to its bytes.
        return same + job_service_pb2.CreateJobRequest(request_id=str(uuid.uuid4())).SerializeToString()

    return make


def judge(cold_s: float, jobs: Load, nothing: Load, check: Load, *, write: bool) -> int:
    """Print the table; 0 if every target was met."""
    p99, ratio = quantile(jobs.took, 0.99), jobs.rate / nothing.rate
    rows = [
        (f"`CreateJob`, {CALLERS} callers", f"at least {TARGET_RATE:,.0f}/s", f"{jobs.rate:,.0f}/s"),
        ("its p99", f"under {TARGET_P99_S * 1000:.0f} ms", f"{p99 * 1000:.0f} ms"),
        ("its median", "", f"{statistics.median(jobs.took) * 1000:.0f} ms"),
        ("the same request through the same guard to a method that does nothing", "", f"{nothing.rate:,.0f}/s"),
        ("`CreateJob` ÷ that", f"at least {TARGET_RATIO}", f"{ratio:.2f}"),
        ("`Health.Check`, through the guard too", "", f"{check.rate:,.0f}/s"),
        (
            "the server's CPU a call: `CreateJob`, nothing, `Check`",
            "",
            f"{jobs.cpu_us:.0f}, {nothing.cpu_us:.0f}, {check.cpu_us:.0f} µs",
        ),
        (
            "the client's CPU a call, on the same cores",
            "",
            ", ".join(f"{each.client_cpu_s / len(each.took) * 1e6:.0f}" for each in (jobs, nothing, check)) + " µs",
        ),
        ("the first submission, with the inspection by a scripted worker", "", f"{cold_s * 1000:.0f} ms"),
    ]
    report("submit", rows, write=write)
    return int(jobs.rate < TARGET_RATE or p99 >= TARGET_P99_S or ratio < TARGET_RATIO)


if __name__ == "__main__":
    sys.exit(main())
