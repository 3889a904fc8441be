"""Ranks of a real service start warm; what is killed of it comes back; and the service says when ranks start cold."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

import shardyard
from helpers.ports import free_port
from helpers.served import Served, pids_of
from helpers.small_specs import sentences

WAIT_S = 240.0

T = TypeVar("T")

# What a parent may leave to a service: a folder that was removed, signals that are ignored or blocked.
ODD_SHELL = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
os.execv(sys.argv[1], sys.argv[1:])
"""


class Warm(Served):
    """A service with an admin port, and a folder in which packages can be installed."""

    admin = ""

    @property
    def packages(self) -> Path:
        return self.folder / "packages"

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    def started(self) -> dict[str, int]:
        """How many ranks have started warm and cold, as Prometheus reads it."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        prefix = "shardyard_ranks_started_total{start="
        found = [line.removeprefix(prefix).split("} ") for line in lines if line.startswith(prefix)]
        return {name.strip('"'): int(float(value)) for name, value in found}

    def keeper(self) -> psutil.Process:
        """The process that keeps the server of ranks, once that answers."""

        def find() -> psutil.Process | None:
            assert self.process is not None
            below = psutil.Process(self.process.pid).children(recursive=True)
            servers = [each for each in below if each.name() == "sy-forks" and each.is_running()]
            return servers[0].parent() if servers else None

        return until(find)


def until(found: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if (value := found()) is not None:
                return value
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "packages").mkdir()
    (folder / "corpus.txt").write_text("\n".join(sentences(60)) + "\n")
    admin = f"127.0.0.1:{free_port()}"
    made = Warm(
        folder,
        "local",
        ("--admin-listen", admin),
        {"PYTHONPATH": str(folder / "packages")},
        shell=(sys.executable, "-c", ODD_SHELL),
    )
    made.admin = admin
    made.start()
    try:
        yield made
    finally:
        made.stop()


def train(service: Warm, job_id: str, *, workers: int = 1) -> None:
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=16),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 1, "n_embd": 8}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=service.folder / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=3, global_batch_size=4),
        resources=shardyard.Resources(workers=workers),
    )
    with shardyard.Client(service.address) as client:
        assert client.submit(spec, job_id=job_id).wait(timeout=WAIT_S).state == "succeeded"


def test_ranks_start_warm_and_are_counted(service: Warm) -> None:
    service.keeper()
    train(service, "warm", workers=2)
    assert service.started() == {"warm": 2, "cold": 0}
    log = (service.state / "compute.log").read_text()
    assert "cold" not in service.log and "ranks start warm" in log and "Traceback" not in log


@pytest.mark.parametrize("how", ["kill", "suspend"])
def test_the_process_that_imports_has_a_successor_too(service: Warm, how: str) -> None:
    before, warned, keeper = service.started(), service.log.count("is started again"), service.keeper()
    getattr(keeper, how)()
    until(lambda: True if service.log.count("is started again") > warned else None)
    assert service.keeper().pid != keeper.pid and not keeper.is_running()
    train(service, how)
    assert service.started() == {"warm": before["warm"] + 1, "cold": before["cold"]}
    assert "ranks start cold: the process with their server ended by SIGKILL" in service.log


def test_the_log_says_once_why_ranks_start_cold(service: Warm) -> None:
    before = service.started()
    (service.packages / "installed-1.0.dist-info").mkdir()
    for job_id in ("cold", "cold-again"):
        train(service, job_id)
    assert service.started() == {"warm": before["warm"], "cold": before["cold"] + 2}
    reason = "ranks start cold: packages were installed or removed since the service started: restart it"
    assert service.log.count(reason) == 1


def test_nothing_is_left_of_a_killed_service(service: Warm) -> None:
    service.keeper()
    begun = pids_of(service.state)
    assert len(begun) >= 4
    service.kill()
    until(lambda: None if any(_runs(pid) for pid in begun) else True)


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
