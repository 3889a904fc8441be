"""How light the parts are that people start: `shardyard --help`, the SDK's import, an idle coordinator without Ray.

python bench/light.py [--write]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from measure import report

BIN = Path(sys.executable).parent
REPEATS = 7


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    write = parser.parse_args().write
    help_s = seconds_of([str(BIN / "shardyard"), "--help"])
    nothing_s = seconds_of([sys.executable, "-c", "pass"])
    import_s = seconds_of([sys.executable, "-c", "import shardyard; shardyard.Client"]) - nothing_s
    memory_mb = idle_coordinator_mb()
    rows = [
        ("`shardyard --help`, median", "under 0.3 s", f"{help_s:.2f} s"),
        ("`import shardyard`, median, over an empty Python", "under 0.6 s", f"{import_s:.2f} s"),
        ("Idle coordinator without Ray, resident", "under 150 MB", f"{memory_mb:.0f} MB"),
    ]
    report("light", rows, write=write)
    return int(help_s >= 0.3 or import_s >= 0.6 or memory_mb >= 150)


def seconds_of(command: list[str]) -> float:
    """The median time of a command, the first run (which fills the disk cache) not counted."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def idle_coordinator_mb() -> float:
    """Resident memory of an idle `shardyard serve --launcher local`, without the processes that it keeps warm."""
    with tempfile.TemporaryDirectory() as state:
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen(
            [str(BIN / "shardyard"), "serve", "--launcher", "local", "--address", address, "--state-dir", state],
            env={**os.environ, "SHARDYARD_STATE_DIR": state},
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_for(address, process)
            time.sleep(3)
            return psutil.Process(process.pid).memory_info().rss / 1e6
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the address accepts connections. Raises RuntimeError if the process ended or it takes a minute."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"no service at {address}; exit code {process.poll()}")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
