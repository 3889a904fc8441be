"""Each kind of task has the losses of plain PyTorch at each stage of ZeRO, on one worker and on two.

These are texts, words, questions, passages, vectors, pictures, chats and preferences. Texts, passages and vectors with
adapters have the losses of plain peft.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from helpers.chat_folders import chat_folder
from helpers.chats import write_lines
from helpers.passages import PlainReranker
from helpers.preferences import PlainPreference
from helpers.small_pictures import write_folders
from helpers.small_specs import classification_spec, shared_data
from helpers.trainer_processes import attempt_in, run_to_the_end
from helpers.trainer_reference import plain_losses
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.tasks.base import Prepared, build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.training.config import train_config

STEPS = 30
CHATS = ("chats", "packed")
PREFERENCES = ("preferences", "preferences-adapters")
TASKS = ("texts", "words", "questions", "passages", "texts-adapters", "pictures", "vectors", *CHATS, *PREFERENCES)
# With the least and the most of sharding; `texts-adapters` have what is between.
ENDS = [(task, *ends) for task in ("passages-adapters", "vectors-adapters") for ends in ((0, 1), (3, 2))]
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    rows = [line.rsplit("\t", 1) for line in (shared_data("sst2") / "train.tsv").read_text().splitlines()[:480]]
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    (folder / "bert").symlink_to(bert)
    texts = (shared_data("wikigold") / "wikigold.conll.txt").read_text().split("\n\n")
    (folder / "train.conll").write_text("\n\n".join(texts[:480]) + "\n")
    paragraphs = short_paragraphs()
    (folder / "questions.json").write_text(json.dumps({"data": paragraphs}))
    write_lines(folder / "passages.jsonl", asked_passages(paragraphs[0]["paragraphs"][:120]))
    chats = json.loads((shared_data("sft") / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    (folder / "chats.json").write_text(json.dumps(chats[:480]))
    pairs = [
        {**{name: row[name] for name in ("instruction", "input")}, "chosen": row["output"], "rejected": other["output"]}
        for row, other in itertools.pairwise(chats[:481])
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    chat_folder(folder / "chat")
    pairs = (shared_data("stsb") / "stsb-en-train.csv").read_text(encoding="utf-8").splitlines()
    (folder / "pairs.csv").write_text("\n".join(pairs[:480]) + "\n", encoding="utf-8")
    return folder


def short_paragraphs() -> list[dict[str, Any]]:
    """Real questions whose contexts, cut short, take one window of 40 tokens or some."""
    articles = json.loads((shared_data("xquad") / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    found = []
    for paragraph in (each for article in articles for each in article["paragraphs"]):
        context = paragraph["context"][:160]
        asked = [
            question
            for question in paragraph["qas"]
            if question["answers"][0]["answer_start"] + len(question["answers"][0]["text"]) <= len(context)
        ]
        found.append({"context": context, "qas": asked})
    return [{"paragraphs": found}]


def asked_passages(paragraphs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Their questions, each with the paragraph that answers it and the next one."""
    return [
        {"query": question["question"], "positives": [own["context"]], "negatives": [other["context"]]}
        for own, other in itertools.pairwise(paragraphs)
        for question in own["qas"]
    ]


def masked_pictures(folder: Path) -> spec_pb2.JobSpec:
    """A small Swin, whose masks are finer than the places of its last layer."""
    write_folders(folder / "pictures", 40, side=32)
    spec = spec_pb2.JobSpec(train_data=spec_pb2.DataSource(uri=str(folder / "pictures")))
    spec.pretraining.masked_image.mask_patch = 4
    spec.pretraining.masked_image.flip = 0.5
    overrides = {
        **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "drop_path_rate": 0,
    }
    spec.model.architecture.model_type = "swin"
    spec.model.architecture.overrides.update(overrides)
    return spec


def answered_chats(folder: Path, *, packing: bool) -> spec_pb2.JobSpec:
    """A small Llama that learns real instructions, one a sample or several."""
    spec = spec_pb2.JobSpec(train_data=spec_pb2.DataSource(uri=str(folder / "chats.json")))
    spec.fine_tuning.instruction.max_length = 192
    spec.fine_tuning.instruction.packing = packing
    spec.model.model = "projects/default/models/chat"
    return spec


def preferred_answers(folder: Path, *, adapted: bool) -> spec_pb2.JobSpec:
    """A small Llama that learns to prefer the answers of real instructions to those of others."""
    spec = spec_pb2.JobSpec(train_data=spec_pb2.DataSource(uri=str(folder / "pairs.json")))
    spec.fine_tuning.preference.max_length = 192
    spec.model.model = "projects/default/models/chat"
    if adapted:
        spec.fine_tuning.lora.rank = 8
    return spec


def spec_of(folder: Path, task: str) -> spec_pb2.JobSpec:
    if task in CHATS:
        spec = answered_chats(folder, packing=task == "packed")
    elif task in PREFERENCES:
        spec = preferred_answers(folder, adapted="adapters" in task)
    else:
        spec = masked_pictures(folder) if task == "pictures" else bert_spec(folder, task)
    optimization = spec.optimization
    optimization.max_steps, optimization.global_batch_size, optimization.learning_rate = STEPS, 16, 1e-4
    spec.evaluation.holdout = 0
    return spec


def bert_spec(folder: Path, name: str) -> spec_pb2.JobSpec:
    task, _, adapted = name.partition("-")
    spec = classification_spec(
        folder / "train.csv",
        {"model": "projects/default/models/bert", "dropout": 0},
        classify={"pooling": "POOLING_MEAN"},
    )
    spec.fine_tuning.text_classification.max_length = 64
    if adapted:
        spec.fine_tuning.lora.rank = 8
    if task == "words":
        # Unequal weights: no two ranks divide by the same number of anything.
        spec.fine_tuning.token_classification.class_weights.balanced = True
        spec.fine_tuning.token_classification.label_all_pieces = True
        spec.fine_tuning.token_classification.max_length = 64
        spec.train_data.uri = str(folder / "train.conll")
        spec.train_data.columns.clear()
    if task == "vectors":
        spec.fine_tuning.sentence_embedding.max_length = 32
        spec.train_data.uri = str(folder / "pairs.csv")
        spec.train_data.header = False
        spec.train_data.columns.clear()
        spec.train_data.columns.update({"anchor": "column_1", "positive": "column_2"})
        # A rank has several micro batches, and learns from those of all.
        spec.optimization.micro_batch_size = 3
    if task == "passages":
        spec.fine_tuning.reranking.max_length = 64
        spec.train_data.uri = str(folder / "passages.jsonl")
        spec.train_data.columns.clear()
    if task == "questions":
        spec.fine_tuning.question_answering.max_length = 40
        spec.fine_tuning.question_answering.overlap = 8
        spec.train_data.uri = str(folder / "questions.json")
        spec.train_data.columns.clear()
    return spec


def attempt_of(folder: Path, task: str, stage: int, workers: int) -> worker_pb2.AttemptSpec:
    spec, name = spec_of(folder, task), f"{task}-z{stage}-w{workers}"
    spec.parallelism.zero_stage = stage
    spec.resources.workers = workers
    models = {f"projects/default/models/{model}": (folder / model).resolve() for model in ("bert", "chat")}
    return attempt_in(folder, name, spec, **models)


@cache
def expected(folder: Path, of: str) -> list[float]:
    """The losses of plain PyTorch."""
    attempt = attempt_of(folder, of, 0, 1)
    torch.manual_seed(0)
    task = prepare(attempt.spec, attempt.locations)
    module = build_module(task, attempt.spec)
    if "adapters" in of and of not in PREFERENCES:
        module = with_plain_peft(task, attempt.spec, module)
    if of in PREFERENCES:
        module = PlainPreference(module.model)
    if of.startswith("passages"):
        module = PlainReranker(module.model)
    config = train_config(attempt, num_train_samples=task.train.num_samples)
    losses, _ = plain_losses(task, module, config)
    return losses


def with_plain_peft(task: Prepared, spec: spec_pb2.JobSpec, ours: HuggingFaceModule) -> HuggingFaceModule:
    """The module without adapters, which peft then puts in by itself, beginning with the same numbers."""
    plain_spec = spec_pb2.JobSpec()
    plain_spec.CopyFrom(spec)
    plain_spec.fine_tuning.ClearField("lora")
    module = build_module(task, plain_spec)
    linear = r".*encoder.*\.(query|key|value|dense)"
    peft.get_peft_model(module.model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=linear))
    for name, parameter in module.named_parameters():
        if ".pooler." in name or ".classifier." in name:
            parameter.requires_grad_()
    module.load_state_dict(ours.state_dict())
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    return module


@pytest.mark.parametrize(("task", "stage", "workers"), [*itertools.product(TASKS, (0, 1, 2, 3), (1, 2)), *ENDS])
def test_a_model_has_the_losses_of_plain_pytorch(folder: Path, task: str, stage: int, workers: int) -> None:
    attempt = attempt_of(folder, task, stage, workers)
    losses = run_to_the_end(attempt).losses()
    assert list(losses) == list(range(1, STEPS + 1))
    worst = max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected(folder, task)))
    print(f"{task}, ZeRO-{stage} on {workers}: worst relative difference {worst:.2e}")
    assert worst < 1e-5
    # Checkpoints of the real BERT in all rows would take 15 GB.
    shutil.rmtree(attempt.job_dir)
