"""What a recommendation costs: a first call, the same models again, and a plan that is kept, from a real service.

    python bench/choosing.py [--calls N] [--write]

The first call counts the models of the task on the meta device; the process that counted them is kept for a minute.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from answer import make_files
from light import free_port, wait_for
from measure import report
from shardyard import Client, JobSpec, Optimization, TextClassification

BIN = Path(sys.executable).parent
TASK = "text-classification"
TARGET_S = 1.0


def main() -> int:
    """Measure, print, and say by the exit code whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10, help="of each kind but the first")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy") as name:
        folder = Path(name)
        make_files(folder)
        address = f"127.0.0.1:{free_port()}"
        command = [BIN / "shardyard", "serve", "--launcher", "local", "--listen", address]
        with subprocess.Popen(
            [*command, "--state-dir", folder / "state"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        ) as service:
            try:
                wait_for(address, service)
                with Client(address) as client:
                    numbers = measure(client, folder, arguments.calls)
            finally:
                service.send_signal(signal.SIGTERM)
                service.wait(timeout=60)
    return judge(numbers, write=arguments.write)


def measure(client: Client, folder: Path, calls: int) -> dict[str, float]:
    """Seconds by name."""
    spec = JobSpec(
        TextClassification(max_length=64),
        model=folder / "bert",
        train_data=folder / "reviews.csv",
        optimization=Optimization(epochs=1),
    )
    client.plan(spec)
    ask = lambda **fields: client.recommend_models(TASK, rows=2000, **fields)  # noqa: E731
    numbers = {"first": seconds(ask)}
    numbers["again"] = statistics.median(seconds(ask) for _ in range(calls))
    numbers["memory"] = statistics.median(seconds(lambda at=at: ask(memory=(8 + at) * 2**30)) for at in range(calls))
    numbers["plan"] = statistics.median(seconds(lambda: client.plan(spec)) for _ in range(calls))
    return numbers


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def judge(numbers: dict[str, float], *, write: bool) -> int:
    """Print the table; 0 if the target was met."""
    rows = [
        ("`RecommendModels`, text classification, the first call", "", f"{numbers['first']:.1f} s"),
        ("again", f"under {TARGET_S:g} s", f"{1000 * numbers['again']:.0f} ms"),
        ("again, with another memory", "", f"{1000 * numbers['memory']:.0f} ms"),
        ("`PlanJob` with a plan that is kept", "", f"{1000 * numbers['plan']:.0f} ms"),
        ("again ÷ kept plan", "", f"{numbers['again'] / numbers['plan']:.0f}"),
    ]
    report("choosing", rows, write=write)
    return int(numbers["again"] >= TARGET_S)


if __name__ == "__main__":
    sys.exit(main())
