"""The server of warm ranks over its life: it comes back, refuses what would be another rank, and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from helpers.confined import is_warm
from helpers.fake_trainer import Script
from helpers.launches import TESTS, collect, fake_launch, gone, kinds, pids
from helpers.warm import ENVIRONMENT, answer_to, named, started, warm_server
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.fork_server import SOCKET
from shardyard_coordinator.launch.heritage import heritage, place
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.launch.rank_process import RankOrders, RankProcess, write_spec
from shardyard_coordinator.seams import SystemClock

LATE_S = 0.1


class Service:
    """A state folder with a server, and a launcher that uses it."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.no_forks = folder / "no-forks"
        self.packages = folder / "packages"
        self.found = folder / "found"
        for made in (self.state, self.packages):
            made.mkdir()
        self.environment = {
            "PYTHONPATH": f"{TESTS}{os.pathsep}{self.packages}",
            "NO_FORKS": str(self.no_forks),
            "LATE_FORKS_S": str(LATE_S),
            "FOUND": str(self.found),
        }

    def launcher(self, **more: str) -> LocalLauncher:
        return LocalLauncher(
            clock=SystemClock(),
            cpus=2,
            program="helpers.fake_trainer",
            environment=self.environment | more,
            hidden=str(self.state),
        )

    async def is_warm(self, folder: Path, **more: str) -> bool:
        """Whether the ranks of a gang, which ends well in any case, are forks."""
        launcher, launch = self.launcher(**more), fake_launch(folder, Script(steps=20, step_s=0.02), workers=1)
        await launcher.ensure(launch)
        events = await collect(launcher, launch.key, until="progress", timeout_s=120)
        found = [is_warm(psutil.Process(pid)) for pid in pids(events)]
        events += await collect(launcher, launch.key, after=events[-1].sequence, timeout_s=120)
        assert events[-1].ended.ok
        await launcher.close(stop_cluster=True)
        return all(found)


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    made = Service(tmp_path_factory.mktemp("service"))
    compute = await warm_server(
        made.state, imports=("helpers.odd_forks", "helpers.afresh_rank"), environment=made.environment
    )
    yield made
    await compute.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_server_that_is_ended_or_stopped_has_a_successor(
    service: Service, tmp_path: Path, how: signal.Signals
) -> None:
    launcher, first = service.launcher(), fake_launch(tmp_path, Script(steps=200, step_s=0.02))
    await launcher.ensure(first)
    events = await collect(launcher, first.key, until="progress", timeout_s=120)
    server = await named("sy-forks")
    server.send_signal(how)
    await gone(server.pid)
    assert await service.is_warm(tmp_path / "next")
    events += await collect(launcher, first.key, after=events[-1].sequence, timeout_s=120)
    assert events[-1].ended.ok and kinds(events).count("progress") == 200
    await launcher.close(stop_cluster=True)


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from helpers.warm import warm_server

async def main():
    state = Path(sys.argv[1])
    compute = await warm_server(state, cache=str(state / "cache"))
    while not await compute.confinement():
        await asyncio.sleep(0.05)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_the_server_ends_with_a_compute_process_that_is_confined(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert process.stdout is not None and await asyncio.to_thread(process.stdout.readline) == "ready\n"
    (compute,) = psutil.Process(process.pid).children()
    keeper = await named("sy-warm", compute.pid)
    server = await named("sy-forks", keeper.pid)
    # Nobody is left who would end the group: the compute process ends alone, with its coordinator.
    process.send_signal(signal.SIGKILL)
    process.wait()
    for each in (compute, keeper, server):
        await gone(each.pid)


async def test_a_socket_that_was_removed_is_made_again(service: Service, tmp_path: Path) -> None:
    socket = service.state / "warm" / SOCKET
    socket.unlink()
    assert not await service.is_warm(tmp_path / "without")
    async with asyncio.timeout(60):
        while not socket.exists():
            await asyncio.sleep(0.05)
    assert await service.is_warm(tmp_path / "again")


async def test_a_folder_that_cannot_be_made_again_for_a_while_is_made_later(service: Service, tmp_path: Path) -> None:
    folder, log = service.state / "warm", service.state / "compute.log"
    folder.rename(tmp_path / "aside")
    folder.write_text("")
    async with asyncio.timeout(60):
        while "ranks start cold" not in log.read_text():
            await asyncio.sleep(0.05)
    assert not await service.is_warm(tmp_path / "without")
    folder.unlink()
    async with asyncio.timeout(60):
        while not (folder / SOCKET).exists():
            await asyncio.sleep(0.05)
    assert await service.is_warm(tmp_path / "again")


async def test_no_process_and_no_descriptor_more_is_no_end_of_the_server(service: Service, tmp_path: Path) -> None:
    server = await named("sy-forks")
    service.no_forks.touch()
    assert not await service.is_warm(tmp_path / "processes")
    service.no_forks.unlink()
    limits = server.rlimit(psutil.RLIMIT_NOFILE)
    server.rlimit(psutil.RLIMIT_NOFILE, (1, limits[1]))
    waiting = asyncio.create_task(started(service.state / "warm", tmp_path / "out", "this", service.environment))
    await asyncio.sleep(0.5)
    server.rlimit(psutil.RLIMIT_NOFILE, limits)
    rank = await waiting
    assert rank is not None and await rank.wait() == 0
    assert await service.is_warm(tmp_path / "again") and server.is_running()


async def test_a_rank_can_be_ended_as_soon_as_it_is_started(service: Service, tmp_path: Path) -> None:
    # A fork that begins late does not lead its process group yet.
    launch = fake_launch(tmp_path, Script(steps=10_000, step_s=0.01), workers=1)
    (Path(launch.attempt_dir) / "logs").mkdir()
    write_spec(worker_pb2.AttemptSpec.FromString(launch.spec))
    orders = RankOrders(
        "helpers.fake_trainer",
        launch.attempt_dir,
        rank=0,
        local_rank=0,
        rights={},
        environment=service.environment | {"DS_ACCELERATOR": "cpu"},
        warm=str(service.state / "warm"),
    )
    rank = await RankProcess.start(orders)
    assert os.getpgid(rank.pid) == rank.pid
    rank.kill()

    async def report(_request: bytes) -> bytes:
        return b""

    async with asyncio.timeout(10):
        assert (await rank.serve(report)).signal == signal.SIGKILL


async def test_a_rank_whose_keeper_is_stopped_still_ends(service: Service, tmp_path: Path) -> None:
    launcher, launch = service.launcher(), fake_launch(tmp_path, Script(steps=10_000, step_s=0.01), workers=1)
    await launcher.ensure(launch)
    [rank] = pids(await collect(launcher, launch.key, until="progress", timeout_s=120))
    keeper = psutil.Process(psutil.Process(rank).ppid())
    assert keeper.name() == "sy-keeper" and psutil.Process(rank).name() == "sy-rank"
    keeper.suspend()
    async with asyncio.timeout(30):
        await launcher.kill(launch.key)
    keeper.resume()
    await gone(keeper.pid)


async def test_ranks_draw_different_numbers_and_end_as_programs_do(service: Service, tmp_path: Path) -> None:
    drawn = []
    for zone in ("Asia/Tokyo", "Africa/Nairobi"):
        rank = await started(
            service.state / "warm", tmp_path / "out", "helpers.afresh_rank", service.environment | {"TZ": zone}
        )
        assert rank is not None and await rank.wait() == 0, (tmp_path / "out").read_text()
        drawn.append(json.loads(service.found.read_text()))
        assert service.found.with_suffix(".end").exists() and not service.found.with_suffix(".server").exists()
        service.found.with_suffix(".end").unlink()
    assert all(drawn[0][name] != drawn[1][name] for name in drawn[0])
    assert [found["zone"] for found in drawn] == ["JST", "EAT"]


async def test_many_starts_leave_nothing(service: Service, tmp_path: Path) -> None:
    async def start_some(number: int) -> None:
        for _ in range(number):
            rank = await started(service.state / "warm", tmp_path / "out", "this", service.environment)
            assert rank is not None and await rank.wait() == 0

    server = await named("sy-forks")
    await start_some(2)
    before = server.num_fds(), server.memory_full_info().uss
    await start_some(25)
    assert server.num_fds() == before[0] and server.memory_full_info().uss < before[1] + 2**20
    async with asyncio.timeout(30):
        while server.children():
            await asyncio.sleep(0.05)


async def test_packages_installed_meanwhile_are_not_mixed_with_those_in_memory(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="shardyard_coordinator")
    metadata = service.packages / "transformers-99.0.dist-info"
    metadata.mkdir()
    assert not await service.is_warm(tmp_path / "installed")
    assert "packages were installed or removed" in caplog.text and "rank 0 starts cold" in caplog.text
    metadata.rmdir()
    assert await service.is_warm(tmp_path / "removed")


async def test_a_variable_that_is_read_at_imports_has_its_value(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="shardyard_coordinator")
    assert not await service.is_warm(tmp_path / "offline", HF_HUB_DOWNLOAD_TIMEOUT="77")
    assert "the watcher's environment has another HF_HUB_DOWNLOAD_TIMEOUT" in caplog.text
    assert await service.is_warm(tmp_path / "any", ANY_OTHER="77", TORCHINDUCTOR_CACHE_DIR="/elsewhere")


async def test_a_watcher_in_another_container_has_no_rank_started(service: Service) -> None:
    # Its process ids are not this machine's: what it ends by number would be another process here.
    there = heritage() | {"place": place() | {"pid": "pid:[1]"}}
    order = {"program": "this", "arguments": [], "rights": {}, "environment": dict(os.environ), "heritage": there}
    assert answer_to(service.state / "warm", order) == {"refused": "the watcher has another pid"}


WATCHER = """
import asyncio, json, os, resource, sys
from pathlib import Path
from helpers.fake_trainer import Script
from helpers.launches import collect, fake_launch, pids
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock

async def main():
    os.nice(3)
    Path("/proc/self/oom_score_adj").write_text("321")
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    launcher = LocalLauncher(
        clock=SystemClock(), program="helpers.fake_trainer", environment=json.loads(sys.argv[3]), hidden=sys.argv[2]
    )
    launch = fake_launch(Path(sys.argv[1]), Script(steps=10_000, step_s=0.01), workers=1)
    await launcher.ensure(launch)
    print(*pids(await collect(launcher, launch.key, until="progress", timeout_s=120)), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_warm_rank_has_what_a_child_of_its_watcher_would_have(service: Service, tmp_path: Path) -> None:
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(tmp_path), str(service.state), json.dumps(service.environment)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
    )
    assert watcher.stdout is not None
    [pid] = (await asyncio.to_thread(watcher.stdout.readline)).split()
    rank, its_watcher = psutil.Process(int(pid)), psutil.Process(watcher.pid)
    assert is_warm(rank)

    def has(process: psutil.Process) -> list[object]:
        score = Path(f"/proc/{process.pid}/oom_score_adj").read_text()
        return [process.nice(), process.cpu_affinity(), process.rlimit(psutil.RLIMIT_NOFILE), process.cwd(), score]

    assert has(rank) == has(its_watcher)
    watcher.kill()
    watcher.wait()
    await gone(rank.pid)
