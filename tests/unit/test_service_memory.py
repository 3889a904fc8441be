"""What the service's own processes take of their machine, and what is left for the workers of a plan."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.plan_requests import ask, filled, fine_tuning, places
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.launch.node_shape import planning_shape
from shardyard_coordinator.launch.service_memory import RESERVED_BYTES, ServiceMemory, measured_bytes
from shardyard_coordinator.seams import SystemClock

MIB = 1 << 20
HELD = 200 * MIB


@contextmanager
def holding(size: int) -> Iterator[int]:
    """The process id of a child in a session of its own, as compute processes and ranks are."""
    code = f"import sys; held = bytearray({size}); print(flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-I", "-S", "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, start_new_session=True) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        yield child.pid
        child.stdin.close()


def test_what_the_service_has_started_counts_and_ranks_do_not() -> None:
    before = measured_bytes([])
    assert before > 10 * MIB
    with holding(HELD) as pid:
        assert measured_bytes([]) - before > 0.95 * HELD
        assert abs(measured_bytes([pid]) - before) < 0.5 * HELD
    assert abs(measured_bytes([]) - before) < 0.5 * HELD


def test_the_number_changes_in_steps_and_is_measured_now_and_then() -> None:
    found = [700 * MIB]
    own = ServiceMemory(lambda ranks: found[-1])

    def at(now_s: float) -> int:
        return asyncio.run(own.reserved_bytes([], now_s=now_s))

    assert at(0.0) == RESERVED_BYTES
    found.append(1000 * MIB)
    assert at(5.0) == RESERVED_BYTES, "measured less than ten seconds ago"
    assert at(10.0) == 1024 * MIB
    found.append(1025 * MIB)
    assert at(20.0) == 1280 * MIB
    found.append(100 * MIB)
    assert at(30.0) == RESERVED_BYTES


def test_the_local_launcher_tells_what_the_service_takes_of_its_node() -> None:
    view = asyncio.run(LocalLauncher(clock=SystemClock(), gpus=0).cluster())
    (node,) = view.nodes
    assert node.reserved_bytes >= RESERVED_BYTES
    assert planning_shape(view, 0).reserved_bytes == node.reserved_bytes
    assert planning_shape(view, 0).memory_bytes == node.memory_bytes > node.reserved_bytes


def test_workers_share_what_the_service_leaves(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    filled(root)
    whole = {"memory_bytes": 8 << 30, "cpus": 4}
    shared = {**whole, "reserved_bytes": 768 * MIB}
    spec = fine_tuning(resources={"workers": 2})
    alone, beside = (ask(root, spec, node).plan.memory for node in (whole, shared))
    assert (alone.available_bytes, alone.reserved_bytes) == (4 << 30, 0)
    assert (beside.available_bytes, beside.reserved_bytes) == ((8 << 30) - 768 * MIB >> 1, 768 * MIB)
    assert beside.total_bytes == alone.total_bytes
    # On a machine that the service fills, nothing fits; it is not one whose memory is not known.
    tiny = ask(root, spec, {"memory_bytes": 512 * MIB, "cpus": 4, "reserved_bytes": 768 * MIB})
    assert [reason for _, reason in places(tiny)] == ["MODEL_DOES_NOT_FIT"]
    # A GPU's memory is its workers' alone.
    gpu = {"gpus": 2, "gpu_memory_bytes": 80 << 30, "bf16": True}
    on_gpu = ask(root, spec, {**shared, **gpu}).plan.memory
    assert (on_gpu.available_bytes, on_gpu.reserved_bytes) == (80 << 30, 0)
