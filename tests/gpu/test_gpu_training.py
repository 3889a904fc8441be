"""The trainer on a GPU, through planning: plain PyTorch's losses at every stage, and a job to its answers.

Skipped if there is no GPU. `bench/gpu.py` makes the same checks without pytest, and measures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.gpu_runs import SPECS, farthest, plain_run, planned_attempt, predicted_accuracy, run_of, trained
from shardyard.v1 import plan_pb2, spec_pb2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
STEPS = 20


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_has_the_losses_of_plain_pytorch_at_every_stage(tmp_path: Path, kind: str, stage: int) -> None:
    run = run_of(SPECS[kind](tmp_path, STEPS), tmp_path, stage=stage, precision=spec_pb2.PRECISION_FP32, gpus=1)
    assert farthest(run.losses, plain_run(run.attempt)) < 1e-4


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_plain_pytorch_in_fp32(tmp_path: Path, kind: str, stage: int) -> None:
    run = run_of(SPECS[kind](tmp_path, STEPS), tmp_path, stage=stage, precision=spec_pb2.PRECISION_BF16, gpus=1)
    assert farthest(run.losses, plain_run(run.attempt)) < 2e-2


def test_a_job_that_says_nothing_of_precision_is_planned_trained_exported_and_asked(tmp_path: Path) -> None:
    attempt = planned_attempt(SPECS["bert"](tmp_path, 60), tmp_path, gpus=1)
    plan = attempt.plan
    assert plan.resolved_spec.optimization.precision == spec_pb2.PRECISION_BF16
    assert plan.memory.verdict == plan_pb2.MEMORY_VERDICT_FITS
    run = trained(attempt)
    accuracy = predicted_accuracy(run, tmp_path / "eval.csv")
    assert run.evaluation.metrics["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.7
