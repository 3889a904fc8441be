"""Whole runs of encoder-decoders by the trainer: losses of plain PyTorch, a resume bit for bit, texts of `Predict`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sacrebleu.metrics.bleu import BLEU
from safetensors.torch import load_file, save_file

from helpers.small_specs import parse, sentences
from helpers.trainer_processes import attempt_in, run_to_the_end
from helpers.trainer_reference import plain_losses
from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config

STEPS = 8
MODELS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    },
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "translation": {"fineTuning": {"translation": {"sourcePrefix": "turn: ", "numBeams": 2, "maxTargetLength": 24}}},
    "summarization": {"fineTuning": {"summarization": {"maxSourceLength": 24, "maxTargetLength": 16}}},
    "span_corruption": {"pretraining": {"spanCorruption": {"sequenceLength": 32}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"source": text, "target": " ".join(reversed(text.split()))} for text in sentences(90)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:11]))
    (folder / "corpus.txt").write_text("\n".join(sentences(90)) + "\n")
    return folder


def attempt_of(
    folder: Path,
    name: str,
    *,
    task: str = "translation",
    model: str = "t5",
    stage: int = 0,
    workers: int = 1,
    dropout: float = 0.0,
    epoch: int = 1,
) -> worker_pb2.AttemptSpec:
    has_pairs = task != "span_corruption"
    data = {"trainData": {"uri": str(folder / ("train.jsonl" if has_pairs else "corpus.txt"))}}
    spec = parse(
        {
            **TASKS[task],
            "model": {"architecture": {"modelType": model, "overrides": MODELS[model]}, "dropout": dropout},
            "tokenizer": {"train": {"vocabSize": 400}},
            **data,
            **({"evalData": {"uri": str(folder / "held.jsonl")}} if has_pairs else {}),
            "optimization": {"maxSteps": STEPS, "globalBatchSize": 9, "learningRate": 0.01, "seed": 4},
            "parallelism": {"zeroStage": stage},
            "resources": {"workers": workers},
            "checkpoints": {"every": 4},
            "evaluation": {"every": 100},
        }
    )
    return attempt_in(folder, name, spec, epoch=epoch)


def answers_of(model: Path, texts: list[str], **parameters: Any) -> list[str]:
    instances = [model_service_pb2.Instance(text=text) for text in texts]
    request = model_service_pb2.PredictRequest(instances=instances)
    if parameters:
        request.generation.CopyFrom(model_service_pb2.GenerationParameters(**parameters))
    call = worker_pb2.PredictCall(folder=str(model), request=request)
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    assert not reply.violations
    return [each.generated_text for each in reply.response.predictions]


@pytest.mark.parametrize(
    ("task", "model", "stage", "workers"),
    [
        ("translation", "t5", 3, 2),
        pytest.param("translation", "bart", 1, 2, marks=pytest.mark.prove),
        pytest.param("summarization", "bart", 3, 2, marks=pytest.mark.prove),
        *(
            pytest.param(task, "t5", stage, workers, marks=pytest.mark.prove)
            for task in ("translation", "span_corruption")
            for stage in (0, 1, 2, 3)
            for workers in (1, 2)
            if (task, stage, workers) != ("translation", 3, 2)
        ),
    ],
)
def test_losses_are_those_of_plain_pytorch_and_the_texts_those_of_predict(
    folder: Path, task: str, model: str, stage: int, workers: int
) -> None:
    attempt = attempt_of(
        folder, f"{task}-{model}-{stage}-{workers}", task=task, model=model, stage=stage, workers=workers
    )
    prepared = prepare(attempt.spec, attempt.locations)
    config = train_config(attempt, num_train_samples=prepared.train.num_samples)
    expected, _ = plain_losses(prepared, build_module(prepared, attempt.spec), config)
    gang = run_to_the_end(attempt)
    losses = gang.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    assert max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected)) < 1e-5
    if task == "translation":
        rows = [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]
        texts = answers_of(Path(attempt.export_dir), [row["source"] for row in rows])
        own = BLEU().corpus_score(texts, [[row["target"] for row in rows]]).score
        assert own == pytest.approx(gang.metrics()["bleu"], abs=1e-9)


@pytest.mark.parametrize("task", ["translation", pytest.param("span_corruption", marks=pytest.mark.prove)])
def test_a_resumed_run_has_the_losses_of_an_undisturbed_one_bit_for_bit(folder: Path, task: str) -> None:
    whole = run_to_the_end(attempt_of(folder, f"whole-{task}", task=task, dropout=0.2)).losses()
    first = attempt_of(folder, f"cut-{task}", task=task, dropout=0.2)
    run_to_the_end(first)
    second = attempt_of(folder, f"cut-{task}", task=task, dropout=0.2, epoch=2)
    second.resume_candidates.append(str(Path(first.attempt_dir) / "step-000000004"))
    assert run_to_the_end(second).losses() == {step: loss for step, loss in whole.items() if step > 4}


@pytest.mark.parametrize(
    ("task", "model"), [("translation", "bart"), pytest.param("span_corruption", "t5", marks=pytest.mark.prove)]
)
def test_the_cards_code_writes_what_predict_writes_in_another_process(folder: Path, task: str, model: str) -> None:
    attempt = attempt_of(folder, f"card-{task}", task=task, model=model)
    run_to_the_end(attempt)
    export = Path(attempt.export_dir)
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\nprint(list(logits.shape))"],
        cwd=export, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = "Hello, my <extra_id_0> is cute" if task == "span_corruption" else "Hello, my dog is cute"
    written = done.stdout.rpartition("\n[")[0].strip()
    # Plain transformers shows what a text begins and ends with, too.
    for mark in ("<pad>", "</s>"):
        written = written.removeprefix(mark).removesuffix(mark)
    assert written.strip() == answers_of(export, [text])[0]
    model_here = transformers.AutoModelForSeq2SeqLM.from_pretrained(export)
    assert model_here.config.model_type == model and torch.isfinite(model_here.get_input_embeddings().weight).all()


def test_an_output_layer_of_its_own_is_trained_and_leaves_with_the_model(folder: Path) -> None:
    """As T5 1.1, FLAN-T5 and mT5 have one, whose config.json ties nothing."""
    before = attempt_of(folder, "tied")
    run_to_the_end(before)
    own = folder / "own"
    shutil.copytree(before.export_dir, own)
    state = load_file(own / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["shared.weight"])
    save_file(state, own / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((own / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (own / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    attempt = attempt_of(folder, "untied", stage=3, workers=2)
    attempt.spec.ClearField("tokenizer")
    attempt.spec.model.uri = str(own)
    # The export is only accepted if it writes as the live model does.
    run_to_the_end(attempt)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(attempt.export_dir)
    assert not model.config.scale_decoder_outputs
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert not torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.encoder.embed_tokens.weight, model.shared.weight)
    assert answers_of(Path(attempt.export_dir), ["the dog"])[0]
