"""The quickstart's service: a signal that ends the quickstart stops it as well."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
MARK = "SHARDYARD_TEST_QUICKSTART"
CODE = """\
import pathlib, sys, time, service
with service.running(pathlib.Path(sys.argv[1]), launcher="local"):
    print("ready", flush=True)
    time.sleep(100)
"""


def test_a_quickstart_that_is_ended_twice_leaves_no_process(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    quickstart = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path / "state")],
        cwd=QUICKSTART,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert quickstart.stdout is not None and quickstart.stdout.readline() == "ready\n"
        assert len(marked(mark)) > 1
        quickstart.terminate()
        # Again, while the service stops.
        time.sleep(0.3)
        quickstart.terminate()
        assert quickstart.wait(timeout=60) == 128 + signal.SIGTERM
        assert not marked(mark)
    finally:
        for process in marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """The live processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
