"""Whole runs on vectors of texts: the losses of plain PyTorch over the whole batch, a resume, plain transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.sentence_specs import KINDS, PlainEmbedder, fresh_bert, rows_of, write_rows
from helpers.small_specs import parse
from helpers.trainer_processes import attempt_in, run_to_the_end
from helpers.trainer_reference import plain_losses
from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for kind in KINDS:
        write_rows(folder / f"{kind}.jsonl", rows_of(kind))
    return folder


def attempt_of(
    folder: Path, kind: str, *, stage: int = 0, workers: int = 1, micro: int = 2, dropout: float = 0.0, epoch: int = 1
) -> worker_pb2.AttemptSpec:
    name = f"{kind}-{stage}-{workers}-{micro}-{dropout}"
    spec = parse(
        {
            **fresh_bert(folder / f"{kind}.jsonl", kind, dropout=dropout),
            "optimization": {
                "maxSteps": STEPS, "globalBatchSize": 9, "microBatchSize": micro, "learningRate": 0.01, "seed": 4,
            },
            "parallelism": {"zeroStage": stage},
            "resources": {"workers": workers},
            "checkpoints": {"every": 3},
            "evaluation": {"every": 100, "holdout": 0.2},
        }
    )  # fmt: skip
    return attempt_in(folder, name, spec, epoch=epoch)


@pytest.mark.parametrize(
    ("kind", "stage", "workers", "micro"),
    [
        # Nine samples: five and four of them, in micro batches of two, so that one rank has a dummy.
        ("triplets", 3, 2, 2),
        pytest.param("pairs", 0, 1, 9, marks=pytest.mark.prove),
        pytest.param("pairs", 2, 2, 5, marks=pytest.mark.prove),
        *(
            pytest.param(kind, stage, workers, 2, marks=pytest.mark.prove)
            for kind in KINDS
            for stage in (0, 1, 2, 3)
            for workers in (1, 2)
            if (kind, stage, workers) != ("triplets", 3, 2)
        ),
    ],
)
def test_the_loss_is_that_of_the_whole_batch_however_it_is_divided(
    folder: Path, kind: str, stage: int, workers: int, micro: int
) -> None:
    attempt = attempt_of(folder, kind, stage=stage, workers=workers, micro=micro)
    prepared = prepare(attempt.spec, attempt.locations)
    config = train_config(attempt, num_train_samples=prepared.train.num_samples)
    expected, norms = plain_losses(prepared, PlainEmbedder(build_module(prepared, attempt.spec).model), config)
    gang = run_to_the_end(attempt)
    losses = gang.losses()
    assert list(losses) == list(range(1, STEPS + 1)) and max(norms) > 0
    assert max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected)) < 1e-5
    assert set(gang.metrics()) >= ({"pearson"} if kind == "scored" else {"recall_1", "mrr"})


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one_and_the_card_makes_the_vectors_of_embed(
    folder: Path,
) -> None:
    first = attempt_of(folder, "pairs", dropout=0.2)
    whole = run_to_the_end(first).losses()
    same_vectors(Path(first.export_dir))
    second = attempt_of(folder, "pairs", dropout=0.2, epoch=2)
    second.resume_candidates.append(str(Path(first.attempt_dir) / "step-000000003"))
    assert run_to_the_end(second).losses() == {step: loss for step, loss in whole.items() if step > 3}


def same_vectors(export: Path) -> None:
    """The code of the model's card gives in another process what `Embed` gives."""
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\nprint(logits.tolist())"],
        cwd=export, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = torch.tensor(json.loads(done.stdout))
    assert written.norm() == pytest.approx(1, abs=1e-5)
    request = model_service_pb2.EmbedRequest(instances=[model_service_pb2.Instance(text="Hello, my dog is cute")])
    call = worker_pb2.EmbedCall(folder=str(export), request=request)
    reply = worker_pb2.EmbedReply.FromString(embed(call.SerializeToString()))
    assert reply.response.embeddings[0].values == pytest.approx(written.tolist(), abs=1e-6)
