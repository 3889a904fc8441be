"""Whole runs of reranking by the trainer: losses of plain PyTorch, a resume bit for bit, and a card that answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.passages import PlainReranker, spec_of, write_passages
from helpers.tiny_folders import save_folder
from helpers.trainer_processes import attempt_in, run_to_the_end
from helpers.trainer_reference import plain_losses
from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_folder(folder / "bert", "BertForMaskedLM")
    write_passages(folder / "a.jsonl")
    return folder


def attempt_of(
    folder: Path, name: str, *, stage: int = 0, workers: int = 1, dropout: float = 0.0, epoch: int = 1
) -> worker_pb2.AttemptSpec:
    spec = spec_of(
        folder / "a.jsonl",
        model={"model": "projects/default/models/bert", "dropout": dropout},
        optimization={"maxSteps": STEPS, "globalBatchSize": 9, "learningRate": 1e-3, "seed": 4},
        evaluation={"holdout": 0.25, "every": 100},
        parallelism={"zeroStage": stage},
        resources={"workers": workers},
        checkpoints={"every": 4},
    )
    return attempt_in(folder, name, spec, epoch=epoch, **{"projects/default/models/bert": folder / "bert"})


def test_losses_are_those_of_plain_pytorch_and_the_cards_scores_those_of_predict(folder: Path) -> None:
    attempt = attempt_of(folder, "plain", stage=2, workers=2)
    prepared = prepare(attempt.spec, attempt.locations)
    config = train_config(attempt, num_train_samples=prepared.train.num_samples)
    expected, _ = plain_losses(prepared, PlainReranker(build_module(prepared, attempt.spec).model), config)
    losses = run_to_the_end(attempt).losses()
    assert list(losses) == list(range(1, STEPS + 1))
    assert max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected)) < 1e-5
    model = Path(attempt.export_dir)
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (pair,) = re.findall(r"tokenizer\((\".*?\"), (\".*?\"),", code)
    query, passage = (json.loads(text) for text in pair)
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{code}print(float(logits[0, 0]))"], cwd=model, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    request = model_service_pb2.PredictRequest()
    request.instances.add().pair.CopyFrom(model_service_pb2.TextPair(text=query, text_pair=passage))
    call = worker_pb2.PredictCall(folder=str(model), request=request)
    (answer,) = worker_pb2.PredictReply.FromString(predict(call.SerializeToString())).response.predictions
    assert answer.logits[0] == pytest.approx(float(done.stdout), abs=1e-5) and 0 < answer.regression.value < 1


@pytest.mark.prove
def test_a_resumed_run_has_the_losses_of_an_undisturbed_one_bit_for_bit(folder: Path) -> None:
    first = attempt_of(folder, "whole", dropout=0.2)
    whole = run_to_the_end(first)
    again = attempt_of(folder, "whole", dropout=0.2, epoch=2)
    again.resume_candidates.append(str(Path(first.attempt_dir) / "step-000000004"))
    resumed = run_to_the_end(again)
    assert resumed.losses() == {step: loss for step, loss in whole.losses().items() if step > 4}
    assert resumed.metrics() == whole.metrics()
