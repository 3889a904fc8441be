"""A private Ray on loopback: started once, left running when the coordinator dies, and found again.

`ray.json` in the state directory says which process it is; a process id counts only with its start time. Ray itself is
not imported: its command line is run. docs/worker-protocol.md has the reasons of its odder steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from shardyard_coordinator.launch.inherited import without_secrets
from shardyard_coordinator.launch.poll import until
from shardyard_coordinator.launch.rank_env import FOREIGN

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_REAP_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 200_000_000
_TEMP_ROOT = Path("/tmp")
_TEMP_PREFIX = "sy-"

_log = logging.getLogger(__name__)


class HeadFailed(Exception):
    """Ray did not start; the text names its log."""


@dataclass(frozen=True)
class HeadRecord:
    """What `ray.json` holds. The head leads a session that contains all of its processes, whatever their names."""

    pid: int
    start_time: float
    address: str
    temp_dir: str
    token_path: str = ""


class EmbeddedHead:
    """The Ray of one state directory."""

    def __init__(
        self, state_dir: Path, *, cpus: int, gpus: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        self._record_path = state_dir / "ray.json"
        self._token_path = state_dir / "ray.token"
        self._log_path = state_dir / "ray-head.log"
        self._cpus = cpus
        self._gpus = gpus
        self._extra = dict(environment or {})
        self._record = _load(self._record_path)
        self._process: asyncio.subprocess.Process | None = None

    async def ensure(self) -> str:
        """The address of the running head; one that is dead, or cannot start workers, is replaced by a new one.

        Raises: HeadFailed.
        """
        if self.intact() and await _answers(self._address()):
            return self._address()
        await self.stop()
        return await self._start()

    @property
    def record(self) -> HeadRecord | None:
        """The known head, or None."""
        return self._record

    def alive(self) -> bool:
        """Whether the head's process runs."""
        return (
            self._record is not None
            and self._record.pid != 0
            and _is_process(self._record.pid, self._record.start_time)
        )

    def intact(self) -> bool:
        """Whether it runs, and its new workers will find its socket and the token of this state."""
        record = self._record
        if record is None or not self.alive() or record.token_path != str(self._token_path):
            return False
        return Path(record.temp_dir, "session_latest", "sockets", "raylet").exists() and self._token_path.exists()

    async def stop(self) -> None:
        """Ends the head and all of its processes, but nothing of another Ray."""
        record = self._record
        if record is None:
            return
        if record.pid == 0:
            record = self._record = _find_process(record)
        if self.alive():
            # Only to the process itself: a signal to the group makes it hang for half a minute.
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)
            await until(lambda: not _is_process(record.pid, record.start_time), timeout_s=_STOP_TIMEOUT_S)
        await until(lambda: not _end_session(record), timeout_s=_REAP_TIMEOUT_S)
        self._record = None
        self._record_path.unlink(missing_ok=True)
        # This deletes the sessions' logs; those of attempts are in the storage.
        folder = Path(record.temp_dir).parent
        if folder.parent == _TEMP_ROOT and folder.name.startswith(_TEMP_PREFIX):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """Environment variables for clients of this Ray."""
        variables = {
            # Makes every socket of Ray bind to loopback; without it the address below is only advertised.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_path),
            # Kills by Ray's out-of-memory killer would look like lost workers.
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self._record.temp_dir if self._record else tempfile.gettempdir(),
        }
        if self._record:
            variables["RAY_ADDRESS"] = self._record.address
        inherited = {name: value for name, value in without_secrets(os.environ).items() if name not in FOREIGN}
        return {**inherited, **variables, **self._extra}

    def _address(self) -> str:
        assert self._record is not None
        return self._record.address

    async def _start(self) -> str:
        self._record_path.parent.mkdir(parents=True, exist_ok=True)
        if not self._token_path.exists():
            _write_private(self._token_path, secrets.token_hex(32))
        # Short, because paths of sockets contain it, and private: Ray lets everybody read its own folder.
        temp_dir = Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=_TEMP_ROOT)) / "r"
        temp_dir.mkdir()
        record = HeadRecord(0, 0.0, "", str(temp_dir), str(self._token_path))
        self._save(record)
        environment = self.environment() | {"RAY_TMPDIR": str(temp_dir)}
        environment.pop("RAY_ADDRESS", None)
        with self._log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address", "127.0.0.1", "--port", "0", "--temp-dir", str(temp_dir)),
                *("--include-dashboard", "false", "--include-log-monitor", "false", "--disable-usage-stats"),
                *("--num-cpus", str(self._cpus), "--num-gpus", str(self._gpus)),
                *("--object-store-memory", str(_OBJECT_STORE_BYTES)),
                # Two Rays bind the default port without an error, and clients reach either.
                *("--ray-client-server-port", str(_free_port()), "--dashboard-agent-listen-port", "0"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=temp_dir,
                start_new_session=True,
            )
        self._process = process
        start_time = started_at(process.pid) or 0.0
        self._save(replace(record, pid=process.pid, start_time=start_time))
        # Ray writes it when the node is complete; a new folder has none of a former Ray.
        address_file = temp_dir / "ray_current_cluster"
        await until(lambda: process.returncode is not None or _read(address_file) != "", timeout_s=_START_TIMEOUT_S)
        address = _read(address_file)
        if process.returncode is not None or not address:
            await self.stop()
            raise HeadFailed(f"Ray did not start within {_START_TIMEOUT_S:.0f} s; see {self._log_path}")
        self._save(replace(record, pid=process.pid, start_time=start_time, address=address))
        return address

    def _save(self, record: HeadRecord) -> None:
        self._record = record
        _write_private(self._record_path, json.dumps(asdict(record)))


def _load(path: Path) -> HeadRecord | None:
    try:
        return HeadRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        _log.warning("%s is not readable; a Ray that it named is left alone", path)
        return None


def _end_session(record: HeadRecord) -> bool:
    """Kills the remaining processes of the head's session; returns whether there were any.

    Two agents outlive a killed head, under other names. A session id may have been reused, but not by processes
    older than the head.
    """
    if record.pid == 0:
        # Processes from outside a container have this session id; none is ours.
        return False
    found = False
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) != record.pid:
                continue
            started = started_at(process.pid)
            if started is not None and started >= record.start_time:
                found = True
                process.kill()
    return found


def _find_process(record: HeadRecord) -> HeadRecord:
    """The record of a head whose start was interrupted, found by its folder, which is in its command line."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            started = started_at(process.pid)
            if started is not None and record.temp_dir in command and "ray.scripts.scripts" in command:
                return replace(record, pid=process.pid, start_time=started)
    return record


def _is_process(pid: int, start_time: float) -> bool:
    return started_at(pid) == start_time


def started_at(pid: int) -> float | None:
    """When a process started, in units that only compare with each other; None if it is gone.

    On Linux in ticks since boot: psutil's seconds since 1970 change when the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if stat[0] in "ZX" else float(stat[19])
    except (FileNotFoundError, ProcessLookupError):
        if sys.platform == "linux" or not psutil.pid_exists(pid):
            return None
        return float(psutil.Process(pid).create_time())


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return True


def _write_private(path: Path, text: str) -> None:
    """Writes the file atomically, readable only by this user."""
    draft = path.with_name(path.name + ".tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
