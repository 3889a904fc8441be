"""What one caller's worst messages cost everybody else: `GetServerInfo` meanwhile, beside an idle service.

    python bench/worst_messages.py [--write]

One server process; one client that sends the worst message of every method (built from the descriptors, nearly 4 MiB
each, as bytes made beforehand), one after the other, and asks `GetServerInfo` all the while. Then many watches that are
opened all at once: how many of them end without a reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc.aio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.worst_messages import Worst, worst_messages
from measure import quantile, report
from shardyard.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc, server_service_pb2, server_service_pb2_grpc
from submit import read_address, requests

HERE = Path(__file__).resolve().parent
IDLE_S = 5.0
PAUSE_S = 0.001
WATCHES = 4_000
STREAM_S = 0.3
# Of a message during which an answer was late: what holds the loop is late every time, other programs are not.
TRIES = 5
TARGET_S, TARGET_RATIO = 0.2, 5.0
# Those that held the loop for seconds before messages were counted, with what they took then.
KNOWN = (
    ("100,000 bad hashes", "a header of 100,000 files with bad hashes, 1.4 MB", "16 s"),
    ("some lists in lists", "130 kB of nested lists in a spec", "4 s"),
    ("an honest header", "an honest header of 32,000 files, 2.8 MB", "1.9 s"),
)


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy") as folder:
        data = Path(folder) / "corpus.txt"
        data.write_text("Hello, my dog is cute.\n" * 100, encoding="utf-8")
        server = subprocess.Popen(
            [sys.executable, HERE / "submit_server.py", folder], stdout=subprocess.PIPE, text=True
        )
        try:
            _, address = (read_address(server) for _ in range(2))
            idle, waits, watched = asyncio.run(measure(address, data))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    return judge(idle, waits, watched, write=arguments.write)


async def measure(address: str, data: Path) -> tuple[list[float], dict[str, list[float]], tuple[int, int, float]]:
    """Seconds of `GetServerInfo` on the idle service and by message; watches served, without a reason, and seconds."""
    async with grpc.aio.insecure_channel(address) as channel:
        idle = await asked_while(channel, asyncio.sleep(IDLE_S))
        waits = {
            f"{worst.path}, {worst.what}": await asked_while(channel, send(channel, worst)) for worst in messages()
        }
        made = await channel.unary_unary("/shardyard.v1.JobService/CreateJob")(requests(data)())
        name = job_service_pb2.WatchJobRequest(name=_name_of(made))
        return idle, waits, await watch_all_at_once(channel, name)


def messages() -> list[Worst]:
    """All of them, made before anything is measured."""
    return list(worst_messages())


def _name_of(job: bytes) -> str:
    return job_pb2.Job.FromString(job).name


async def asked_while(channel: grpc.aio.Channel, doing: Awaitable[Any]) -> list[float]:
    """Seconds of each `GetServerInfo` while something is being done."""
    stub, took = server_service_pb2_grpc.ServerServiceStub(channel), []
    task = asyncio.ensure_future(doing)
    while not task.done():
        start = time.perf_counter()
        await stub.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        took.append(time.perf_counter() - start)
        await asyncio.sleep(PAUSE_S)
    await task
    return took


async def send(channel: grpc.aio.Channel, worst: Worst) -> None:
    """One message, and its answer, which for most is a refusal."""
    method = worst.method
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    make = kinds[method.client_streaming, method.server_streaming](worst.path)
    call = make(iter([worst.data]) if method.client_streaming else worst.data, timeout=60)
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(STREAM_S if method.server_streaming else None):
            if method.server_streaming:
                async for _ in call:
                    pass
            else:
                await call
    call.cancel()


async def watch_all_at_once(
    channel: grpc.aio.Channel, request: job_service_pb2.WatchJobRequest
) -> tuple[int, int, float]:
    """(watches that were served, those that ended with a bare code, seconds until the last one was served)."""
    stub, start = job_service_pb2_grpc.JobServiceStub(channel), time.perf_counter()
    calls = [stub.WatchJob(request) for _ in range(WATCHES)]
    answers = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
    took = time.perf_counter() - start
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    bare = [
        error
        for error in failed
        if not isinstance(error, grpc.aio.AioRpcError)
        or not any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata())
    ]
    for call in calls:
        call.cancel()
    return len(answers) - len(failed), len(bare), took


def judge(idle: list[float], waits: dict[str, list[float]], watched: tuple[int, int, float], *, write: bool) -> int:
    """Print the table; 0 if every target was met."""
    longest = {what: max(took) for what, took in waits.items()}
    worst = max(longest, key=longest.__getitem__)
    ratio = statistics.median(each for took in waits.values() for each in took) / statistics.median(idle)
    served, bare, took_s = watched
    rows = [
        (
            "`GetServerInfo` on the idle service: median, p99, longest",
            "",
            ms(statistics.median(idle), quantile(idle, 0.99), max(idle)),
        ),
        (
            f"the longest while one of {len(waits)} worst messages was read",
            f"under {TARGET_S * 1000:.0f} ms",
            f"{ms(longest[worst])} ({worst.rpartition('/')[2]})",
        ),
        ("the median meanwhile ÷ the idle median", f"at most {TARGET_RATIO:g}", f"{ratio:.1f}"),
    ]
    for what, words, before in KNOWN:
        found = max(took for name, took in longest.items() if what in name)
        rows.append((f"the longest during {words}", "", f"{ms(found)}, before {before}"))
    rows.append(
        (
            f"{WATCHES:,} watches opened at once: without a reason",
            "0",
            f"{bare}; {served:,} served in {took_s:.1f} s, before 2,559",
        )
    )
    report("worst messages", rows, write=write)
    return int(longest[worst] > TARGET_S or ratio > TARGET_RATIO or bare > 0 or served < WATCHES)


def ms(*seconds: float) -> str:
    """Milliseconds in words."""
    return f"{', '.join(f'{each * 1000:.1f}' for each in seconds)} ms"


if __name__ == "__main__":
    sys.exit(main())
