"""GPUs of this machine, and who may run where some are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.fake_nvml import FakeGpu, fake_nvml
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.launch.gpus import GpuUse, gpu_use, usable_gpus
from shardyard_coordinator.launch.protocols import ClusterView, Node
from shardyard_coordinator.serve.plans import check_fits

GPU_NODE = Node("g", "10.0.0.1", 16, 4, 1 << 36, "gpu")
CPU_NODE = Node("c", "10.0.0.2", 8, 0, 1 << 36, "")


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_number_given_counts_and_a_torch_without_cuda_finds_none(devices: Path) -> None:
    torch = pytest.importorskip("torch")
    assert usable_gpus(1, devices) == ["0"]
    assert usable_gpus(0, devices) == []
    assert usable_gpus(None, devices) == (["0", "1"] if torch.version.cuda else [])


def test_only_devices_that_this_process_may_see_are_given_out(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert usable_gpus(1, devices) == ["5"]


def test_the_use_of_gpus_is_the_drivers_and_a_split_one_has_no_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpu("GPU-a", 50, 1024), FakeGpu("GPU-b", 0, 2048, is_split=True)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(*gpus))
    assert gpu_use() == [GpuUse("0", 0.5, 1024, 80 * 1024**3), GpuUse("1", None, 2048, 80 * 1024**3)]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(has_driver=False))
    assert gpu_use() == []


def view(*nodes: Node) -> ClusterView:
    return ClusterView(True, "id", "ray", nodes)


def test_nodes_with_gpus_hold_no_job_that_asks_for_none() -> None:
    check_fits(view(GPU_NODE, CPU_NODE), 8, 0, 1)
    check_fits(view(GPU_NODE, CPU_NODE), 4, 1, 2)
    with pytest.raises(Refused, match="at most 8"):
        check_fits(view(GPU_NODE, CPU_NODE), 9, 0, 1)
    with pytest.raises(Refused, match="the largest has 8"):
        check_fits(view(GPU_NODE, CPU_NODE), 1, 0, 9)


def test_if_all_nodes_have_gpus_the_error_says_what_to_request() -> None:
    with pytest.raises(Refused) as refused:
        check_fits(view(GPU_NODE), 2, 0, 1)
    assert refused.value.reason is Reason.TOO_LARGE_FOR_CLUSTER
    assert refused.value.violations[0].field == "job.spec.resources.gpus_per_worker"
    assert "ask for 1" in str(refused.value)
