"""The command line, run as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = [sys.executable, "-c", "from shardyard.cli import main; main()"]


def shardyard(address: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command against a service; its exit code and what it printed."""
    environment = {**os.environ, "SHARDYARD_ADDRESS": address, "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *arguments], input=text, capture_output=True, text=True, env=environment, timeout=30, check=False
    )


def modules_after(code: str) -> set[str]:
    """All modules that a process has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())
