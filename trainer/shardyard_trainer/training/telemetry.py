"""What a rank's process uses while it runs: CPU, memory, and its GPU, sampled in a thread of its own.

The metrics are those of the job: `system/cpu_percent/0` and so on, the last part the rank. A sample costs 0.3 ms of
CPU time with its sending, and one that fails is left out: telemetry never ends a run. The first one comes after a few
seconds, then one in a hundredth of the time so far, so that a long run has hundreds, not hundreds of thousands.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("shardyard")
FIRST_S = 5.0
LEAST_S = 10.0
MOST_S = 60.0
MAX_RANKS = 64
"""Ranks beyond these report nothing: each has series of its own."""

_STATM = Path("/proc/self/statm")


class Usage:
    """Reads what this process uses. `gpu_uuid` is that of its device as NVML knows it; empty: none."""

    def __init__(self, gpu_uuid: str = "") -> None:
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._gpu = _Gpu.open(gpu_uuid) if gpu_uuid else None
        self._at_s, self._cpu_s = time.monotonic(), time.process_time()

    def sample(self) -> dict[str, float]:
        """`cpu_percent` since the last sample (100 is one core), `rss_bytes`, and `gpu_*` if there is one."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        busy = (cpu_s - self._cpu_s) / max(now_s - self._at_s, 1e-3)
        self._at_s, self._cpu_s = now_s, cpu_s
        values = {"cpu_percent": 100 * busy, "rss_bytes": float(_resident_pages() * self._page_bytes)}
        return {**values, **self._gpu.sample()} if self._gpu else values


class _Gpu:
    """One GPU, asked through NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, uuid: str) -> _Gpu | None:
        """The GPU of that UUID; None if NVML is not there or does not know it."""
        try:
            import pynvml  # Only ranks with a GPU need it.

            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except ImportError:
            _log.info("no telemetry of the GPU: nvidia-ml-py is not installed")
        except pynvml.NVMLError as error:
            _log.info("no telemetry of the GPU: %s", error)
        return None

    def sample(self) -> dict[str, float]:
        """Utilisation in percent, memory in use, and power; what the driver does not report is left out."""
        nvml, handle = self._nvml, self._handle
        readings: dict[str, Callable[[], float]] = {
            "gpu_utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu_memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu_power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        values = {}
        for name, read in readings.items():
            try:
                values[name] = float(read())
            except nvml.NVMLError:  # A MIG slice, for example, has no utilisation of its own.
                continue
        return values


@contextmanager
def telemetry(
    report: Callable[[Mapping[str, float]], None], *, rank: int, device: torch.device, first_s: float = FIRST_S
) -> Iterator[None]:
    """Reports samples of this process while the body runs, and one at its end: `report` is called in another thread."""
    if rank >= MAX_RANKS:
        yield
        return
    usage = Usage(_uuid(device))
    over = threading.Event()
    thread = threading.Thread(target=_run, args=(usage, report, over, first_s), name="telemetry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _run(usage: Usage, report: Callable[[Mapping[str, float]], None], over: threading.Event, first_s: float) -> None:
    begun_s = time.monotonic()
    wait_s = first_s
    while True:
        is_over = over.wait(wait_s)
        try:
            report(usage.sample())
        except OSError as error:
            _log.info("no telemetry: %s", error)
            return
        if is_over:
            return
        wait_s = min(max(LEAST_S, (time.monotonic() - begun_s) / 100), MOST_S)


def _resident_pages() -> int:
    return int(_STATM.read_text().split()[1])


def _uuid(device: torch.device) -> str:
    """The UUID of a rank's GPU: its number is another one where CUDA_VISIBLE_DEVICES chooses."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
