"""A real service as a process: started, killed with -9, started again on the same state, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import shardyard
from helpers.ports import free_port
from helpers.stores import of_service

BIN = Path(sys.executable).parent
START_S = 60.0
STOP_S = 60.0


@dataclass
class Served:
    """A service on its own state folder and port; `shell` is a command that becomes the one after it, as `env` does."""

    folder: Path
    launcher: str
    options: Sequence[str] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    shell: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.address = self.address or f"127.0.0.1:{free_port()}"

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.folder / "state"

    @property
    def environment(self) -> dict[str, str]:
        """What leads the command line to this service."""
        # The tests have imported DeepSpeed, which sets variables that a user's shell does not have.
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
        return {
            **own,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "SHARDYARD_ADDRESS": self.address,
            "SHARDYARD_STATE_DIR": str(self.state),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
            **of_service(self.folder),
            **self.extra,
        }

    def start(self) -> None:
        """Starts it and returns when the port accepts connections."""
        with (self.folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*self.shell, BIN / "shardyard", "serve"),
                    *("--listen", self.address, "--launcher", self.launcher, *self.options),
                ],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until_it_listens(self.address, self.process, self.folder / "serve.log")

    def computing_s(self) -> float:
        """CPU seconds of the service and all that it started: a clock that other work on the machine does not turn.

        Without those of the process that imports what ranks need: it does so once, beside whatever is asked meanwhile.
        """
        assert self.process is not None
        service, total_s = psutil.Process(self.process.pid), 0.0
        for process in (service, *service.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() != "sy-warm":
                    total_s += sum(process.cpu_times()[:4])  # Its own, and those of its children that have ended.
        return total_s

    def kill(self) -> None:
        """Ends the coordinator with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends the service and its embedded Ray in good order, whatever state it is in."""
        command = [BIN / "shardyard", "stop", "--cancel-jobs"]
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=self.environment, capture_output=True, timeout=STOP_S, check=False)
            self.process.wait(timeout=STOP_S)
        self.process.kill()
        self.process.wait()

    def run(self, *command: str, cwd: Path | None = None, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs a command in the environment of this service."""
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextlib.contextmanager
def served(
    folder: Path, launcher: str, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """A service that runs, and is gone at the end; `environment` is added to the usual one."""
    service = Served(folder, launcher, options, environment or {})
    try:
        service.start()
        yield service
    finally:
        service.stop()


def wait_until_it_listens(address: str, service: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the port accepts connections. Raises RuntimeError with the service's log otherwise."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and service.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"`shardyard serve` did not start: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def rank_pids(state: Path, job_uid: str) -> dict[int, int]:
    """The process of each rank of a job's gang, found by the log that it writes: {rank: pid}."""
    found: dict[int, int] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            target = str(Path(f"/proc/{process.pid}/fd/2").readlink())
            if f"/jobs/{job_uid}/" in target and target.startswith(str(state)):
                found[int(Path(target).name.split(".")[0].removeprefix("rank-"))] = process.pid
    return found


def pids_of(state: Path) -> set[int]:
    """Every process whose environment or command line names the state folder, and all that they started."""
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = str(state) in " ".join(process.cmdline()) or process.environ().get("SHARDYARD_STATE_DIR") == str(
                state
            )
            if named and process.pid != os.getpid():
                found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    return found


def wait_for_step(job: shardyard.Job, step: int) -> int:
    """Watches until progress has reached a step; the cursor of that event."""
    for event in job.watch():
        if event.progress is not None and event.progress.step >= step:
            return event.sequence
    raise AssertionError(f"{job.id} ended before step {step}")


def attempts_told(job: shardyard.Job) -> Iterator[shardyard.types.Attempt]:
    """An attempt of the job each time that one changes."""
    for event in job.watch():
        if isinstance(event.data, shardyard.types.AttemptChanged) and event.data.attempt is not None:
            yield event.data.attempt


def state_dir() -> Path:
    """A new folder with a short path: the paths of Ray's sockets have to fit into 107 characters."""
    return Path(tempfile.mkdtemp(prefix="sy-"))


def interrupt(pid: int) -> None:
    """SIGKILL to one process."""
    os.kill(pid, signal.SIGKILL)
