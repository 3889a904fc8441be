"""Processes of tests as forks of one that has imported what ranks need: the service's own server, one a test process.

`python -m helpers.warm_ranks FOLDER FD` is the process that this server belongs to.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from shardyard_coordinator.launch.fork_server import SOCKET, WARM, fork_server, in_folder, open_folder
from shardyard_coordinator.launch.frames import frame, receive_frame
from shardyard_coordinator.launch.heritage import Origin, heritage

TESTS = Path(__file__).parent.parent
_START_S = 120.0
_MODULES_FROM = {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}


class WarmProcess:
    """A started fork, with the part of Popen that tests need."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal. Raises TimeoutExpired."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                payload = receive_frame(self._connection)
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            assert payload is not None, "its keeper is gone"
            self.returncode = json.loads(payload)["status"]
            self._connection.close()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless its end is known."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it."""
        self.send_signal(signal.SIGKILL)


def start(
    program: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdout: IO[Any] | int,
    stderr: IO[Any] | int,
    reports: socket.socket | None = None,
) -> WarmProcess:
    """Starts a module; it gets `--report-fd` with the descriptor of `reports`, or with one that leads nowhere."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_START_S)
    order = {
        "program": program,
        "arguments": list(arguments),
        "environment": {**environment, **_MODULES_FROM},
        "rights": {},
        "heritage": heritage(),
    }
    with open_folder(_server()) as opened, open(os.devnull, "wb") as nowhere:
        connection.connect(f"{in_folder(opened)}/{SOCKET}")
        streams = [each if isinstance(each, int) else each.fileno() for each in (stdout, stderr, reports or nowhere)]
        socket.send_fds(connection, [b"\0"], [opened, *streams])
        connection.sendall(frame(json.dumps(order).encode()))
        payload = receive_frame(connection)
    answer = json.loads(payload or b"{}")
    assert "pid" in answer, answer.get("refused", "the server did not take the order")
    return WarmProcess(answer["pid"], connection)


@functools.cache
def _server() -> Path:
    """The folder of this process's server, which ends with it."""
    parent = Path(tempfile.mkdtemp(prefix="sy-warm-"))
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        # DeepSpeed and OpenMP read these when they are imported.
        **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        **_MODULES_FROM,
    }
    command = [sys.executable, "-W", "ignore", "-m", "helpers.warm_ranks", str(parent / "warm"), str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()
        shutil.rmtree(parent)

    atexit.register(end)
    deadline = time.monotonic() + _START_S
    while not (parent / "warm" / SOCKET).exists():
        assert process.poll() is None and time.monotonic() < deadline, "the server of warm ranks did not start"
        time.sleep(0.02)
    return parent / "warm"


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[2]))
    fork_server(Path(sys.argv[1]), WARM, control, Origin.now())
    control.recv(1)  # Nothing is sent: this is the end of the process that started it.


if __name__ == "__main__":
    main()
