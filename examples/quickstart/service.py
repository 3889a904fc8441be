"""A Shardyard service of the quickstart's own: started on a free port of loopback, stopped, and nothing of it left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

BIN = Path(sys.executable).parent
MARK = "SHARDYARD_QUICKSTART"
START_S = 90.0
STOP_S = 60.0


class ServiceFailed(Exception):
    """The service did not start, or left something behind."""


class Service:
    """`shardyard serve` with a private state folder and a private Ray on loopback."""

    def __init__(self, state: Path, *, launcher: str, flags: tuple[str, ...] = ()) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.state = state
        self.log = state / "serve.log"
        self._mark = uuid.uuid4().hex
        self.environment = {
            **os.environ,
            "SHARDYARD_STATE_DIR": str(state),
            "SHARDYARD_ADDRESS": self.address,
            # The processes of the service inherit it, wherever they end up: so they can be found.
            MARK: self._mark,
        }
        command = [str(BIN / "shardyard"), "serve", "--address", self.address, "--launcher", launcher, *flags]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Return when it accepts connections. Raises ServiceFailed with the end of its log otherwise."""
        host, _, port = self.address.rpartition(":")
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.1)
        raise ServiceFailed(f"`shardyard serve` did not start:\n{self.tail()}")

    def stop(self) -> None:
        """End service and Ray with `shardyard stop`. Raises ServiceFailed if a process is left."""
        if self._process.poll() is None:
            subprocess.run(
                [str(BIN / "shardyard"), "stop", "--cancel-jobs"],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                timeout=STOP_S,
                check=False,
                start_new_session=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_S)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        if left := self.processes():
            names = ", ".join(f"{process.pid} {name_of(process)}" for process in left)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            raise ServiceFailed(f"left behind, ended now: {names}")

    def processes(self) -> list[psutil.Process]:
        """Every live process that the service started, directly or not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_mine = process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
                if is_mine and process.pid != os.getpid():
                    found.append(process)
        return found

    def tail(self) -> str:
        """The end of the service's own log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


@contextlib.contextmanager
def running(state: Path, *, launcher: str = "ray", flags: tuple[str, ...] = ()) -> Iterator[Service]:
    """A ready service, stopped at the end and on SIGTERM. Raises ServiceFailed if a process is left."""
    state.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, end)
    try:
        service = Service(state, launcher=launcher, flags=flags)
        try:
            service.wait_until_ready()
            yield service
        finally:
            with postponed(signal.SIGTERM, signal.SIGINT):
                service.stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def end(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler that ends the process as any error does: so what is running gets stopped."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def postponed(*numbers: signal.Signals) -> Iterator[None]:
    """Handles signals at the end of the block: a stop that is cut short leaves Ray without a service to end it."""
    came: list[signal.Signals] = []
    before = {number: signal.signal(number, lambda one, _: came.append(signal.Signals(one))) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def name_of(process: psutil.Process) -> str:
    """The start of its command line, or its name."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:120] or process.name()
    return "(gone)"


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
