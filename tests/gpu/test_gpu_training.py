"""The trainer on a GPU: NCCL, bf16 by default, and losses near those in fp32. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.small_specs import causal_spec, locations, write_corpus
from helpers.trainer_processes import TrainerGang
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def losses(tmp_path: Path, precision: spec_pb2.Precision, stage: int) -> list[float]:
    spec = causal_spec(write_corpus(tmp_path))
    spec.optimization.precision = precision
    spec.optimization.max_steps = 30
    spec.parallelism.zero_stage = stage
    spec.resources.gpus_per_worker = 1
    folder = tmp_path / f"{precision}-{stage}"
    attempt = worker_pb2.AttemptSpec(
        job_name="projects/default/jobs/gpu",
        job_uid="0" * 32,
        epoch=1,
        spec=spec,
        locations=locations(tmp_path),
        job_dir=str(folder),
        attempt_dir=str(folder / "e000001"),
        export_dir=str(folder / "model"),
        world_size=1,
        threads_per_rank=1,
    )
    gang = TrainerGang(attempt)
    assert gang.wait() == [0]
    assert any(event.HasField("exported") for event in gang.events)
    points = [
        (point.step, point.value)
        for event in gang.events
        for series in event.metrics.series
        if series.metric == "loss"
        for point in series.points
    ]
    return [value for _, value in sorted(points)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns_like_fp32(tmp_path: Path, stage: int) -> None:
    exact = losses(tmp_path, spec_pb2.PRECISION_FP32, stage)
    rounded = losses(tmp_path, spec_pb2.PRECISION_BF16, stage)
    assert len(rounded) == 30
    assert rounded[-1] < rounded[0] - 0.3
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) < 0.1
