"""What a plan proposes instead of a job that does not fit: each proposal is submitted in so little memory, and runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from helpers.memory_groups import joined, limited_group
from helpers.served import BIN, served
from helpers.small_specs import sentences

SHARDYARD = str(BIN / "shardyard")
# 163 million parameters: their states take 2.6 GB, more than there is beside the service.
SIZES = {"num_hidden_layers": 23, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
LIMIT = 3 << 30
pytestmark = pytest.mark.prove


def test_what_is_proposed_for_a_job_that_does_not_fit_really_runs(tmp_path: Path) -> None:
    with (tmp_path / "train.csv").open("w", newline="") as file:
        rows = [[text, ("good", "bad")[at % 2]] for at, text in enumerate(sentences(64))]
        csv.writer(file).writerows([["text", "label"], *rows])
    shape = [f"--set=spec.model.architecture.overrides.{name}={value}" for name, value in SIZES.items()]
    job = ["--task", "text-classification", "--architecture", "bert", *shape, "--max-length", "32", "--max-steps", "3"]
    job += ["--set", "spec.tokenizer.train.vocab_size=300", "--train", str(tmp_path / "train.csv"), "--workers", "1"]
    with limited_group(LIMIT) as group, joined(group), served(tmp_path / "service", "local") as service:
        planned = service.run(SHARDYARD, "plan", *job, "--json")
        plan = json.loads(planned.stdout)
        assert plan["memory"]["verdict"] == "no_fit", planned.stdout[-2000:] + planned.stderr[-2000:]
        refused = service.run(SHARDYARD, "submit", *job)
        assert refused.returncode != 0 and "MODEL_DOES_NOT_FIT" in refused.stdout + refused.stderr
        assert plan["memory"]["available_bytes"] + plan["memory"]["reserved_bytes"] <= LIMIT
        assert plan["alternatives"]
        for each in plan["alternatives"]:
            settings = [f"--set={path}={value}" for path, value in each["settings"].items()]
            done = service.run(SHARDYARD, "submit", *job, *settings, timeout_s=900)
            print(f"{each['settings']}: exit {done.returncode}")
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
