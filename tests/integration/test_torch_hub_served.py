"""Models of PyTorch Hub through the service: local repositories whose code the operator allows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardyard
from helpers.repository import ROOT
from helpers.served import Served, served
from helpers.small_pictures import write_folders
from helpers.tiny_folders import bert_tokenizer
from helpers.torch_hub_nets import AWKWARD, NESTED_ENCODER, NET
from helpers.torch_hub_repos import bert, encoder, resnet, transformer, write_repository


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Served]]:
    """A data root with repositories, and a service that allows them."""
    folder = tmp_path_factory.mktemp("hub")
    write = {"resnet": resnet, "encoder": encoder, "bert": bert, "transformer": transformer}
    repositories = [make(folder / name) for name, make in write.items()]
    repositories.append(write_repository(folder / "awkward", hubconf=AWKWARD))
    repositories.append(write_repository(folder / "nested", hubconf=NESTED_ENCODER))
    bert_tokenizer().save_pretrained(folder / "nested")
    options = [f"--torch-hub-repo={each}" for each in repositories]
    torch_home = {"TORCH_HOME": str(folder / "torch")}
    options += ["--cpus", "2", "--data-root", str(folder)]
    with served(folder / "service", "local", *options, environment=torch_home) as service:
        yield folder, service


def run_card(folder: Path) -> list[float]:
    """The logits that the code in a model's README computes in a fresh process."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(logits[0].flatten().tolist())"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(number) for number in done.stdout.splitlines()[-1].strip("[]").split(",")]


def test_a_resnet_of_a_local_repository_is_trained_by_two_workers_exported_with_its_code_and_answers(
    place: tuple[Path, Served],
) -> None:
    folder, service = place
    write_folders(folder / "garden", 16)
    held_out = write_folders(folder / "held", 4, first=200)
    model = shardyard.TorchHub(folder / "resnet", "resnet18", {"width": 8, "num_classes": 10})
    spec = shardyard.JobSpec(
        shardyard.ImageClassification(image_size=32),
        model=model,
        train_data=f"server:{folder}/garden",
        eval_data=f"server:{folder}/held",
        optimization=shardyard.Optimization(epochs=6, learning_rate=5e-3, global_batch_size=12, seed=3),
        parallelism=shardyard.Parallelism(zero_stage=3),
        resources=shardyard.Resources(workers=2),
    )
    with shardyard.Client(service.address) as client:
        plan = client.plan(spec)
        assert plan.num_parameters == 176_907
        assert len(plan.resolved_spec["model"]["torch_hub"]["revision"]) == 64
        job = client.submit(spec, job_id="flowers")
        assert job.wait(timeout=400).state == "succeeded", job.info.failure
        trained = client.model("flowers")
        assert trained.info.metrics["accuracy"] > 0.6
        answers = trained.predict(held_out)
        right = sum(answer.label == path.parent.name for answer, path in zip(answers, held_out, strict=True))
        assert right / len(held_out) == pytest.approx(trained.info.metrics["accuracy"], abs=1e-9)
        why = trained.explain(held_out[0])
        assert why.is_complete and why.regions is not None and why.target == answers[0].label
        trained.download(folder / "download")
    (folder / "download" / "picture.png").write_bytes(held_out[0].read_bytes())
    assert (folder / "download" / "torch_hub" / "resnet.py").read_bytes() == (folder / "resnet/resnet.py").read_bytes()
    assert run_card(folder / "download") == pytest.approx(answers[0].logits, abs=1e-4)


def test_the_example_is_planned_with_another_repository(place: tuple[Path, Served]) -> None:
    folder, service = place
    write_folders(folder / "here" / "flowers" / "train", 3)
    write_folders(folder / "here" / "flowers" / "test", 2, first=100)
    (folder / "here" / "torch-hub.yaml").write_bytes((ROOT / "examples" / "torch-hub.yaml").read_bytes())
    command = ["shardyard", "plan", "torch-hub.yaml", "--set", f"job.spec.model.torch_hub.repo={folder}/resnet"]
    command += ["--set", "job.spec.model.torch_hub.arguments.width=8"]
    done = subprocess.run(
        command,
        cwd=folder / "here",
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[0].split() == ["parameters", "176,907"]


def test_a_module_with_the_habits_of_its_author_is_trained_and_answers_when_the_weights_that_it_loaded_are_gone(
    place: tuple[Path, Served],
) -> None:
    folder, service = place
    write_folders(folder / "few", 6)
    picture = folder / "few" / "rose" / "000.jpg"
    spec = shardyard.JobSpec(
        shardyard.ImageClassification(image_size=24),
        model=shardyard.TorchHub(folder / "awkward", "awkward.v1", {"pretrained": True}),
        train_data=folder / "few",
        optimization=shardyard.Optimization(max_steps=2, learning_rate=1e-2, global_batch_size=4),
    )
    weights = folder / "torch" / "hub" / "checkpoints" / "net.pth"
    with shardyard.Client(service.address) as client:
        with pytest.raises(shardyard.errors.ShardyardError, match=r"have the operator put net\.pth into torch's cache"):
            client.plan(spec)
        torch.save(state_of_awkward(), weights)
        assert client.plan(spec).num_parameters == 275
        job = client.submit(spec, job_id="awkward")
        assert job.wait(timeout=300).state == "succeeded", job.info.failure
    weights.unlink()
    service.kill()
    service.start()
    with shardyard.Client(service.address) as client:
        trained = client.model("awkward")
        (answer,) = trained.predict([picture])
        trained.download(folder / "awkward_download")
    tensors = load_file(folder / "awkward_download" / "model.safetensors")
    assert torch.equal(tensors["pos_embed"], torch.full((8,), 0.25)), "what its author froze was trained"
    assert not torch.equal(tensors["conv.weight"], state_of_awkward()["conv.weight"].float())
    assert tensors["turns"].is_complex() and torch.equal(tensors["fc.weight"], tensors["also.0.weight"])
    (folder / "awkward_download" / "picture.png").write_bytes(picture.read_bytes())
    assert run_card(folder / "awkward_download") == pytest.approx(answer.logits, abs=1e-4)


def state_of_awkward() -> dict[str, torch.Tensor]:
    """The weights that the repository's address has."""
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = names["Net"]().state_dict()
    turns = torch.polar(torch.ones(8), torch.linspace(0, 1, 8))
    again = {f"also.0.{name}": state[f"fc.{name}"] for name in ("weight", "bias")}
    return {**state, **again, "pos_embed": torch.full((8,), 0.25), "turns": turns}


TEXTS = [
    pytest.param("encoder", shardyard.TextClassification(), "reviews.csv", "Hello, my dog is cute", id="encoder"),
    pytest.param(
        "encoder", shardyard.TokenClassification(), "tags.jsonl", "the dog eats", id="tags", marks=pytest.mark.prove
    ),
    pytest.param(
        "bert", shardyard.TextClassification(), "reviews.csv", "the dog is good", id="bert", marks=pytest.mark.prove
    ),
    pytest.param(
        "transformer", shardyard.Translation(), "pairs.jsonl", "the dog runs", id="transformer", marks=pytest.mark.prove
    ),
]


@pytest.mark.parametrize(("name", "task", "file", "text"), TEXTS)
def test_a_model_of_texts_is_trained_by_two_workers_and_answers(
    name: str, task: Any, file: str, text: str, place: tuple[Path, Served]
) -> None:
    folder, service = place
    write_texts(folder)
    with shardyard.Client(service.address) as client:
        job = client.submit(
            task,
            model=shardyard.TorchHub(folder / name, name),
            train_data=folder / file,
            optimization=shardyard.Optimization(max_steps=4, learning_rate=5e-3, global_batch_size=8),
            parallelism=shardyard.Parallelism(zero_stage=2),
            resources=shardyard.Resources(workers=2),
        )
        assert job.wait(timeout=400).state == "succeeded", job.info.failure
        trained = client.model(job.id)
        (answer,) = trained.predict([text])
        assert trained.info.model_type == {"encoder": "torch_hub_texts", "transformer": "bart"}.get(name, name)
        if name == "encoder":
            assert trained.explain(text).is_complete
            assert len(trained.embed([text])[0].values) == 16
            trained.download(folder / job.id)
            logits = run_card(folder / job.id)
            # The card's own text is the one that was asked for classes; tags have no logits.
            assert not answer.logits or logits == pytest.approx(answer.logits, abs=1e-4)
        else:
            assert not [file for file in trained.info.files if "torch_hub" in file.path]


def test_adapters_and_frozen_layers_of_a_plain_torch_encoder_are_trained_and_exported(
    place: tuple[Path, Served],
) -> None:
    folder, service = place
    write_texts(folder)
    with shardyard.Client(service.address) as client:
        job = client.submit(
            shardyard.TextClassification(),
            model=shardyard.TorchHub(folder / "nested", "nested"),
            train_data=folder / "reviews.csv",
            lora=shardyard.Lora(rank=2),
            freeze=shardyard.Freeze(layers=1),
            optimization=shardyard.Optimization(max_steps=3, learning_rate=1e-1, global_batch_size=8),
        )
        assert job.wait(timeout=300).state == "succeeded", job.info.failure
        long, short = "the dog is good and is a cat", "the dog"
        model = client.model(job.id)
        together, (alone,) = model.predict([long, short]), model.predict([short])
        assert together[1].logits == pytest.approx(alone.logits, abs=1e-5)
        why = model.explain(long)
        assert why.is_complete and [each.text for each in why.attributions] == long.split()


def write_texts(folder: Path) -> None:
    words = ("runs", "eats", "sleeps")
    rows = [f"the dog is {'good' if index % 2 else 'bad'},{'yes' if index % 2 else 'no'}" for index in range(24)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    pairs = [{"source": f"the dog {word}", "target": f"{word} a cat"} for word in words * 8]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tagged = [{"tokens": ["the", "dog", word], "tags": ["O", "B-ANIMAL", "O"]} for word in words * 8]
    (folder / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
