"""Real models on real data through the command line, as the example specs have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import shardyard
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARDYARD = str(BIN / "shardyard")
pytestmark = pytest.mark.prove


def submit(service: Served, *arguments: str) -> None:
    done = service.run(SHARDYARD, "submit", *arguments, timeout_s=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def final_metrics(service: Served, job_id: str) -> dict[str, float]:
    done = service.run(SHARDYARD, "get", job_id, "--json")
    metrics: dict[str, float] = json.loads(done.stdout)["evaluation"]["metrics"]
    return metrics


def test_a_bert_reads_sst2_and_predicts_what_its_evaluation_says(service: Served, bert: Path) -> None:
    data = shared_data("sst2")
    files = ["--train", str(data / "train.tsv"), "--eval", str(data / "test.tsv")]
    submit(service, str(EXAMPLES / "sst2.yaml"), "--model", str(bert), *files)
    accuracy = final_metrics(service, "sst2")["accuracy"]
    assert accuracy >= 0.885
    rows = [line.rsplit("\t", 1) for line in (data / "test.tsv").read_text().splitlines()]
    with shardyard.Client(service.address) as client:
        answers = client.model("sst2").predict([text for text, _ in rows])
    right = sum(answer.label == label for answer, (_, label) in zip(answers, rows, strict=True))
    assert right / len(rows) == pytest.approx(accuracy, abs=1e-9)


def test_characters_of_shakespeare_reach_the_loss_of_nanogpt(service: Served, tmp_path: Path) -> None:
    shutil.copy(shared_data("tinyshakespeare") / "input.txt", tmp_path)
    submit(service, str(EXAMPLES / "tinyshakespeare.yaml"), "--train", str(tmp_path / "input.txt"))
    assert final_metrics(service, "tinyshakespeare")["loss"] <= 1.93
