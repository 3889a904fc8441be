"""Whole runs of recommendation by the trainer: losses of plain PyTorch, a resume bit for bit, a card that answers."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.small_specs import architecture, locations, parse
from helpers.trainer_processes import attempt_in, run_to_the_end
from helpers.trainer_reference import plain_losses
from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.items import ItemInputs
from shardyard_trainer.models.door import open_folder
from shardyard_trainer.models.folder import read_folder
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config

STEPS = 12
MASKED = {"pretraining": {"maskedItem": {"maxHistory": 8, "maskProbability": 0.4}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(5)
    rows = [f"u{user},i{draw.randrange(40)}" for user in range(60) for _ in range(draw.randint(3, 12))]
    (folder / "a.csv").write_text("user,item\n" + "\n".join(rows) + "\n")
    return folder


def attempt_of(
    folder: Path,
    name: str,
    *,
    stage: int = 0,
    workers: int = 1,
    model: str = "gpt2",
    dropout: float = 0.0,
    epoch: int = 1,
) -> worker_pb2.AttemptSpec:
    spec = parse(
        {
            **(MASKED if model == "bert" else {"fineTuning": {"recommendation": {"maxHistory": 8}}}),
            "model": {**architecture(model), "dropout": dropout},
            "trainData": {"uri": str(folder / "a.csv")},
            "optimization": {"maxSteps": STEPS, "globalBatchSize": 9, "learningRate": 0.01, "seed": 4},
            "parallelism": {"zeroStage": stage},
            "resources": {"workers": workers},
            "checkpoints": {"every": 6},
            "evaluation": {"every": 100},
        }
    )
    return attempt_in(folder, name, spec, epoch=epoch)


@pytest.mark.parametrize(
    ("model", "stage", "workers"),
    [
        ("gpt2", 3, 2),
        ("bert", 1, 2),
        # A Llama's output layer is not its embeddings.
        pytest.param("llama", 1, 2, marks=pytest.mark.prove),
        *(
            pytest.param("gpt2", stage, workers, marks=pytest.mark.prove)
            for stage, workers in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2))
        ),
        *(
            pytest.param("bert", stage, workers, marks=pytest.mark.prove)
            for stage, workers in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2))
        ),
    ],
)
def test_losses_are_those_of_plain_pytorch_and_the_ranking_those_of_predict(
    folder: Path, model: str, stage: int, workers: int
) -> None:
    attempt = attempt_of(folder, f"{model}-{stage}-{workers}", stage=stage, workers=workers, model=model)
    prepared = prepare(attempt.spec, attempt.locations)
    config = train_config(attempt, num_train_samples=prepared.train.num_samples)
    expected, _ = plain_losses(prepared, build_module(prepared, attempt.spec), config)
    gang = run_to_the_end(attempt)
    losses = gang.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    assert max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected)) < 1e-5
    assert gang.metrics()["hr_10"] == pytest.approx(hit_rate(Path(attempt.export_dir), folder / "a.csv"), abs=1e-9)


def hit_rate(model: Path, data: Path) -> float:
    """Of the last item of each user among the ten that `Predict` names."""
    histories: dict[str, list[str]] = {}
    for line in data.read_text().splitlines()[1:]:
        user, item = line.split(",")
        histories.setdefault(user, []).append(item)
    request = model_service_pb2.PredictRequest(
        instances=[
            model_service_pb2.Instance(items=model_service_pb2.Items(items=items[:-1])) for items in histories.values()
        ]
    )
    call = worker_pb2.PredictCall(folder=str(model), request=request)
    answers = worker_pb2.PredictReply.FromString(predict(call.SerializeToString())).response.predictions
    hits = [
        items[-1] in {each.item for each in answer.ranked_items.items}
        for items, answer in zip(histories.values(), answers, strict=True)
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("model", ["gpt2", pytest.param("bert", marks=pytest.mark.prove)])
def test_a_resumed_run_has_the_losses_of_an_undisturbed_one_bit_for_bit(folder: Path, model: str) -> None:
    whole = run_to_the_end(attempt_of(folder, f"whole-{model}", dropout=0.2, model=model)).losses()
    first = attempt_of(folder, f"cut-{model}", dropout=0.2, model=model)
    run_to_the_end(first)
    second = attempt_of(folder, f"cut-{model}", dropout=0.2, epoch=2, model=model)
    second.resume_candidates.append(str(Path(first.attempt_dir) / "step-000000006"))
    resumed = run_to_the_end(second).losses()
    assert resumed == {step: loss for step, loss in whole.items() if step > 6}


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """A trained model's folder."""
    attempt = attempt_of(folder, "exported")
    run_to_the_end(attempt)
    return Path(attempt.export_dir)


ITEMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not an object": (lambda saved: [], "is not an object of format 1"),
    "of another format": (lambda saved: {**saved, "format": 2}, "is not an object of format 1"),
    "an item that is a number": (lambda saved: {**saved, "items": [7, *saved["items"][1:]]}, "not a list of ids"),
    "an item twice": (lambda saved: {**saved, "items": saved["items"][:1] * 40}, "twice"),
    "an item too few": (lambda saved: {**saved, "items": saved["items"][1:]}, "so the model needs"),
    "a mask that is an item": (lambda saved: {**saved, "mask": 7}, "which is not the token after the last item"),
    "a mask too many": (lambda saved: {**saved, "mask": 41}, "so the model needs 42 tokens"),
    "no length": (lambda saved: {**saved, "max_history": True}, "max_history 'True'"),
}


@pytest.mark.parametrize("name", ITEMS)
def test_a_folder_with_another_catalogue_is_refused_when_it_comes(name: str, exported: Path, tmp_path: Path) -> None:
    change, message = ITEMS[name]
    shutil.copytree(exported, tmp_path / "model")
    assert not inspected(tmp_path / "model").violations
    assert inspected(tmp_path / "model").model.task == "recommendation"
    saved = json.loads((exported / "items.json").read_text())
    (tmp_path / "model" / "items.json").write_text(json.dumps(change(saved)))
    told = [violation.message for violation in inspected(tmp_path / "model").violations]
    assert any(message in each for each in told), told


def inspected(folder: Path) -> worker_pb2.InspectModelResult:
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    return worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))


def test_a_trained_model_is_trained_on_with_its_own_catalogue(folder: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(
        "user,item\n" + "".join(f"u{user},i{user + at}\n" for user in range(9) for at in range(4))
    )
    name = "projects/default/models/walks"
    spec = attempt_of(folder, "on").spec
    spec.train_data.uri = str(tmp_path / "b.csv")
    spec.model.Clear()
    spec.model.model = name
    where = locations(tmp_path, **{name: exported})
    prepared = prepare(spec, where)
    assert prepared.inputs == ItemInputs.load(open_folder(exported), read_folder(open_folder(exported)))
    own = build_module(prepared, spec).state_dict()["model.transformer.wte.weight"]
    assert torch.equal(own, load_file(exported / "model.safetensors")["transformer.wte.weight"])
    with (tmp_path / "b.csv").open("a") as file:
        file.write("u1,unheard-of\n")
    with pytest.raises(SpecError, match="1 items are not in the catalogue of the model"):
        prepare(spec, where)


@pytest.fixture(scope="module")
def masked(folder: Path) -> Path:
    """The folder of a model trained on masked items."""
    attempt = attempt_of(folder, "masked", model="bert")
    run_to_the_end(attempt)
    return Path(attempt.export_dir)


@pytest.mark.parametrize("kind", ["exported", "masked"])
def test_the_cards_code_gives_the_ranking_of_predict_in_another_process(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(kind)
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}\nprint(history)"],
        cwd=model,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranked, history = (re.findall(r"'([^']+)'", line) for line in done.stdout.splitlines())
    instance = model_service_pb2.Instance(items=model_service_pb2.Items(items=history))
    call = worker_pb2.PredictCall(folder=str(model), request=model_service_pb2.PredictRequest(instances=[instance]))
    (answer,) = worker_pb2.PredictReply.FromString(predict(call.SerializeToString())).response.predictions
    assert len(ranked) == 10 and ranked == [each.item for each in answer.ranked_items.items]
