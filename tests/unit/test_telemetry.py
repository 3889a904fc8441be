"""What a rank's process uses: sampled beside the run, cheaply, and never in its way."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping

import pytest
import torch

from helpers.fake_nvml import FakeGpu, fake_nvml
from shardyard_trainer.training.telemetry import MAX_RANKS, Usage, telemetry

CPU = torch.device("cpu")


def test_a_sample_is_cheap_and_says_what_the_process_uses() -> None:
    usage = Usage()
    begun_s = time.thread_time()
    for _ in range(200):
        values = usage.sample()
    cost_s = (time.thread_time() - begun_s) / 200
    assert cost_s < 0.002  # Measured: 11 µs; a sample every 10 s is nothing even at this bound.
    assert values.keys() == {"cpu_percent", "rss_bytes"} and 10e6 < values["rss_bytes"] < 1e12


def test_a_gpus_values_are_those_that_its_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, split = FakeGpu("GPU-a", 97, 5 * 1024**3), FakeGpu("GPU-b", 0, 1024, is_split=True)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(whole, split))
    seen = Usage("GPU-a").sample()
    assert (seen["gpu_utilization_percent"], seen["gpu_memory_bytes"]) == (97, 5 * 1024**3)
    assert seen["gpu_power_watts"] == 250
    assert Usage("GPU-b").sample().keys() >= {"rss_bytes", "gpu_memory_bytes", "gpu_power_watts"}
    assert "gpu_utilization_percent" not in Usage("GPU-b").sample()
    assert Usage("GPU-c").sample().keys() == Usage("").sample().keys() == {"cpu_percent", "rss_bytes"}


def test_cpu_percent_is_that_of_the_time_since_the_last_sample() -> None:
    usage = Usage()
    until_s = time.process_time() + 0.2
    while time.process_time() < until_s:
        pass
    assert usage.sample()["cpu_percent"] > 1
    time.sleep(0.3)
    assert usage.sample()["cpu_percent"] < 50


def test_even_a_short_run_has_a_sample_and_a_failing_report_does_not_end_it() -> None:
    seen: list[Mapping[str, float]] = []
    with telemetry(seen.append, rank=0, device=CPU):
        assert any(thread.name == "telemetry" for thread in threading.enumerate())
    assert len(seen) == 1 and not any(thread.name == "telemetry" for thread in threading.enumerate())

    def refuse(_values: Mapping[str, float]) -> None:
        raise OSError(28, "no space")

    with telemetry(refuse, rank=0, device=CPU, first_s=0.01):
        time.sleep(0.1)
    assert len(seen) == 1


def test_ranks_beyond_the_bound_report_nothing() -> None:
    seen: list[Mapping[str, float]] = []
    with telemetry(seen.append, rank=MAX_RANKS, device=CPU):
        pass
    assert seen == []
