"""The run on a GPU, rehearsed: every part of `bench/gpu.py` works, and its checks hold, with tiny models on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.repository import ROOT

pytestmark = pytest.mark.prove


def test_the_gpu_run_rehearses_every_part_on_cpus_with_little_more_than_torch() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'client'}:{ROOT / 'trainer'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--rehearse"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    for part in ("ZeRO-2", "A job from plan to answers", "gpt2: ours ÷ a plain bf16 loop", "bert: memory planned"):
        assert any(part in row for row in rows), done.stdout
