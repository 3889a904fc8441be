"""The GPUs of this machine that gangs may use, and their properties."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GpuFacts:
    """The weakest of some GPUs; empty and 0: not known. `compute_capability` is CUDA's, such as 9.0."""

    gpu_name: str = ""
    gpu_memory_bytes: int = 0
    compute_capability: float = 0.0


def usable_gpus(count: int | None = None, devices: Path = Path("/dev")) -> list[str]:
    """The first `count`, else all NVIDIA devices visible to this process, as CUDA_VISIBLE_DEVICES names them.

    Without a count there are none if torch was built without CUDA.
    """
    found = [path.name[6:] for path in devices.glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    if count is None and not _torch_has_cuda():
        return []
    numbers = [str(number) for number in range(len(found) if count is None else count)]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return numbers
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return numbers if count is not None and count > len(names) else names[: len(numbers)]


def _torch_has_cuda() -> bool:
    """Whether torch was built with CUDA, by the name of its build, because importing it takes a second."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def gpu_facts(devices: Sequence[str] | None = None) -> GpuFacts:
    """The properties of these devices, or of all, according to NVIDIA's driver.

    Devices are numbers or UUIDs, as in CUDA_VISIBLE_DEVICES.
    """
    import pynvml  # Only nodes with GPUs need it.

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return GpuFacts()
    try:
        names = [str(number) for number in range(pynvml.nvmlDeviceGetCount())] if devices is None else devices
        found = [_facts(pynvml, name) for name in names]
    except pynvml.NVMLError:
        return GpuFacts()
    finally:
        pynvml.nvmlShutdown()
    return min(found, key=lambda facts: (facts.compute_capability, facts.gpu_memory_bytes), default=GpuFacts())


def _facts(nvml: Any, device: str) -> GpuFacts:
    """Name, memory and capability of one GPU. Raises: NVMLError."""
    handle = (
        nvml.nvmlDeviceGetHandleByIndex(int(device)) if device.isdigit() else nvml.nvmlDeviceGetHandleByUUID(device)
    )
    name = nvml.nvmlDeviceGetName(handle)
    memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    if not device.startswith("MIG-"):
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    else:
        # A MIG slice has its own memory, and the capability of its GPU.
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(
            nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        )
    return GpuFacts(str(name), memory_bytes, float(f"{major}.{minor}"))


@dataclass(frozen=True)
class GpuUse:
    """One GPU of this machine now: its number, how busy it is (0 to 1; None: not reported), and its memory."""

    gpu: str
    busy_share: float | None
    used_bytes: int
    memory_bytes: int


def gpu_use() -> list[GpuUse]:
    """All GPUs of this machine, according to NVIDIA's driver; empty without one."""
    import pynvml  # Only machines with GPUs need it.

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_use(pynvml, number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _use(nvml: Any, number: int) -> GpuUse:
    """Raises: NVMLError."""
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    busy_share = None
    with contextlib.suppress(nvml.NVMLError):  # A GPU that is split into MIG slices has none.
        busy_share = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    return GpuUse(str(number), busy_share, int(memory.used), int(memory.total))
