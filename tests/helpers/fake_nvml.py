"""NVIDIA's driver as `pynvml` shows it, with GPUs that are made up: machines with a GPU are rare."""

from __future__ import annotations

import types
from dataclasses import dataclass


@dataclass(frozen=True)
class FakeGpu:
    """A GPU; one that is split into MIG slices reports no utilisation."""

    uuid: str
    busy_percent: int
    used_bytes: int
    memory_bytes: int = 80 * 1024**3
    milliwatts: int = 250_000
    is_split: bool = False


class NVMLError(Exception):
    """What every function of the driver raises."""


def fake_nvml(*gpus: FakeGpu, has_driver: bool = True) -> types.ModuleType:
    """A module to put in the place of `pynvml`."""
    module = types.ModuleType("pynvml")

    def start() -> None:
        if not has_driver:
            raise NVMLError("Driver Not Loaded")

    def by_uuid(uuid: str) -> FakeGpu:
        for gpu in gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError("Not Found")

    def rates(gpu: FakeGpu) -> types.SimpleNamespace:
        if gpu.is_split:
            raise NVMLError("Not Supported")
        return types.SimpleNamespace(gpu=gpu.busy_percent)

    functions = {
        "NVMLError": NVMLError,
        "nvmlInit": start,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda number: gpus[number],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(used=gpu.used_bytes, total=gpu.memory_bytes),
        "nvmlDeviceGetUtilizationRates": rates,
        "nvmlDeviceGetPowerUsage": lambda gpu: gpu.milliwatts,
    }
    vars(module).update(functions)
    return module
