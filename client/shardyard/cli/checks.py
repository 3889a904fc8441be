"""The checks of `doctor`: Python, packages, memory, disk, GPUs, and the service. Each finding says what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardyard._lines import size
from shardyard._sync.client import Client
from shardyard.errors import ShardyardError
from shardyard.types import ClusterInfo, StorageInfo

Verdict = Literal["works", "note", "broken"]

_EXTRAS = {
    "server": ("sqlalchemy", "alembic", "pydantic_settings", "protovalidate", "psutil", "ray"),
    "train": ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "pyarrow", "sklearn"),
}
_LEAST_DISK = 5 * 2**30
_LEAST_MEMORY = 2 * 2**30
# Losing a cluster that was reached before is a failure; one that is still connecting may just be slow.
_VERDICTS: Mapping[str, Verdict] = {"unreachable": "broken", "connecting": "note"}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    verdict: Verdict
    subject: str
    message: str
    next_step: str = ""

    def line(self) -> str:
        """As a line for people."""
        return f"{self.verdict:<7} {self.subject}: {self.message}"


def examine(client: Client, state_dir: Path | None) -> list[Finding]:
    """All checks that can be made from this machine."""
    return [*_python(), *_packages(), *_hardware(), *_disk(state_dir), *_network(), *_service(client)]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    tried = sys.version_info[:2] == (3, 11)
    yield Finding("works" if tried else "note", "Python", version, "" if tried else "Shardyard is tested with 3.11")


def _packages() -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        what = "the service" if extra == "server" else "training"
        if missing:
            step = f"to run {what} here: pip install 'shardyard[{extra}]'; the SDK and CLI work without"
            yield Finding("note", f"extra `{extra}`", f"{', '.join(missing)} not installed", step)
        else:
            versions = ", ".join(f"{name} {_version(name)}" for name in modules[:3] + modules[-1:])
            yield Finding("works", f"extra `{extra}`", versions)


def _version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(names[0]) if names else "?"


def _hardware() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("works", "CPU", f"{cores} core{'s' * (cores != 1)}, so as many slots by default")
    memory = _available_memory()
    if memory is not None:
        enough = memory >= _LEAST_MEMORY
        step = "" if enough else "a rank takes about 0.4 GiB before its model, a small BERT 1.2 GiB"
        yield Finding("works" if enough else "note", "memory", f"{size(memory)} available", step)
    gpus = _gpus()
    if gpus:
        yield Finding("works", "GPUs", ", ".join(gpus))
    else:
        yield Finding("note", "GPUs", "none found", "jobs run on CPU cores, in fp32 over gloo")


def _available_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _gpus() -> list[str]:
    """Asks the driver's own tool: importing torch takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _disk(state_dir: Path | None) -> Iterator[Finding]:
    if state_dir is None:
        home = os.environ.get("XDG_STATE_HOME")
        state_dir = (Path(home) if home else Path.home() / ".local" / "state") / "shardyard"
    existing = next(path for path in (state_dir, *state_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        yield Finding("broken", "state", f"{state_dir} cannot be written", "give --state-dir, or SHARDYARD_STATE_DIR")
    elif free < _LEAST_DISK:
        step = "a checkpoint takes 16 bytes per parameter; give another --storage-root"
        yield Finding("note", "state", f"{state_dir}: {size(free)} free", step)
    else:
        yield Finding("works", "state", f"{state_dir}: {size(free)} free")
    if not os.access(tempfile.gettempdir(), os.W_OK):
        yield Finding("broken", "temporary files", f"{tempfile.gettempdir()} cannot be written", "set TMPDIR")


def _network() -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            yield Finding("works", "loopback", "ports can be bound")
    except OSError as error:
        yield Finding("broken", "loopback", f"no port can be bound: {error}", "the service listens on 127.0.0.1")


def _service(client: Client) -> Iterator[Finding]:
    try:
        info = client.server_info()
    except ShardyardError as error:
        step = "" if "serv" in error.message else "shardyard serve"
        yield Finding("broken" if error.metadata.get("hangs") else "note", "service", error.message, step)
        return
    yield Finding("works", "service", f"{client.address}, version {info.version}, tasks {', '.join(info.tasks)}")
    cluster = info.cluster
    if cluster is not None:
        yield _cluster(cluster)
    if info.storage is not None:
        yield _storage(info.storage)
    yield from _confinement(info.confinement)
    for warning in info.warnings:
        yield Finding("note", "service", warning)


def _cluster(cluster: ClusterInfo) -> Finding:
    """Where gangs run, as the service sees it."""
    if cluster.state == "connected":
        free = f"{cluster.launcher} connected, {cluster.free_slots} of {cluster.slots} slots free"
        return Finding("works", "cluster", free)
    step = f"{cluster.message or 'it does not answer'}; jobs wait until it is connected"
    return Finding(_VERDICTS.get(cluster.state, "note"), "cluster", f"{cluster.launcher} {cluster.state}", step)


def _storage(storage: StorageInfo) -> Finding:
    """The service's storage, which need not be on this machine."""
    free = f"{size(storage.free_bytes)} free"
    if storage.state == "available":
        return Finding("works", "storage", free)
    words = storage.state if storage.state == "unavailable" else f"{storage.state}, {free}"
    return Finding("broken", "storage", words, storage.message)


def _confinement(holds: Mapping[str, str]) -> Iterator[Finding]:
    """The rights of the processes that open clients' files, as the service reports them."""
    if not holds:
        return
    whole = holds.get("landlock", "").startswith("version")
    step = "" if whole else "a kernel with Landlock (Linux 5.19 or later) keeps them from reading anything else"
    words = "; ".join(f"{name} {text}" for name, text in sorted(holds.items()))
    all_are = whole and not holds.get("ranks", "").startswith("not")
    yield Finding("works" if all_are else "note", "confinement", words, step)
