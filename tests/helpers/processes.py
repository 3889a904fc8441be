"""A coordinator as a process of its own, on port 0."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAIN = [sys.executable, "-m", "shardyard_coordinator.main"]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a coordinator on this state folder."""
    return {
        **os.environ,
        "SHARDYARD_STATE_DIR": str(folder),
        "SHARDYARD_LISTEN": "127.0.0.1:0",
        "SHARDYARD_LAUNCHER": "local",
        **more,
    }


@contextmanager
def running(folder: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A coordinator and its address."""
    process = subprocess.Popen(
        MAIN, env=environment(folder, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "next: " in line and line.rstrip().endswith("shardyard submit FILE.yaml"), line
        yield process, line.split("serves on ")[1].split(";")[0]
    finally:
        process.kill()
        process.communicate()


def ends(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A coordinator that does not start: its exit code and what it says."""
    return subprocess.run(
        MAIN, env=environment(folder, **more), capture_output=True, text=True, timeout=60, check=False
    )
