"""Fashion-MNIST, its first 10,000 pictures: a small ResNet learns as well as in a plain PyTorch loop."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from helpers.beside import script
from helpers.small_specs import locations, parse
from helpers.trainer_processes import attempt_in, run_to_the_end
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.idx import read_idx
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.engine import decay_groups

assets = script("examples/quickstart", "assets")
images = script("examples/quickstart", "stories.images")

PICTURES = 10_000
RESNET = {
    "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic", "num_channels": 1,
    "downsample_in_first_stage": False,
}  # fmt: skip
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` with the four files of the Debian package, the training pair cut to its first pictures."""
    folder = tmp_path_factory.mktemp("fashion")
    try:
        place = images.fashion_folder()
    except assets.AssetsUnavailable as error:
        pytest.skip(str(error))
    (folder / "data").mkdir()
    for path in place.glob("*ubyte*"):
        shutil.copy(path, folder / "data")
    _cut(folder)
    return folder


def _cut(folder: Path) -> None:
    source = spec_pb2.DataSource(uri=str(folder / "data"), path="train-images-idx3-ubyte.gz")
    files = resolve_source(source, locations(folder))
    pixels, labels = bytearray(), bytearray()
    for _, number, picture, label in read_idx(files):
        pixels += picture.tobytes()
        labels.append(label)
        if number == PICTURES:
            break
    for file in files:
        file.path.unlink()
    count = PICTURES.to_bytes(4, "big")
    side = (28).to_bytes(4, "big")
    (folder / "data" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + count + side + side + pixels)
    (folder / "data" / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count + labels)


def spec_of(folder: Path) -> spec_pb2.JobSpec:
    return parse(
        {
            "fine_tuning": {"image_classification": {"image_size": 28, "flip": 0.5}},
            "model": {"architecture": {"model_type": "resnet", "overrides": RESNET}},
            "train_data": {"uri": str(folder / "data"), "path": "train-images-idx3-ubyte"},
            "eval_data": {"uri": str(folder / "data"), "path": "t10k-images-idx3-ubyte.gz"},
            "optimization": {"epochs": 4, "global_batch_size": 64, "learning_rate": 2e-3, "micro_batch_size": 64},
            "resources": {"workers": 1},
            "evaluation": {"every": 1000},
        }
    )


def test_a_small_resnet_is_not_worse_than_in_a_plain_loop(folder: Path) -> None:
    spec = spec_of(folder)
    attempt = attempt_in(folder, "job", spec)
    attempt.threads_per_rank = 2
    started = time.monotonic()
    gang = run_to_the_end(attempt)
    ours = next(dict(event.exported.model.metrics) for event in gang.events if event.HasField("exported"))
    elapsed = time.monotonic() - started
    plain, plain_s = plain_accuracy(spec, folder)
    print(
        f"accuracy {ours['accuracy']:.4f} in {elapsed:.0f} s (process and all); "
        f"plain loop {plain:.4f} in {plain_s:.0f} s"
    )
    assert ours["accuracy"] > 0.811, "a logistic regression on 3,000 of the pictures"
    assert ours["accuracy"] > plain - 0.01


def plain_accuracy(spec: spec_pb2.JobSpec, folder: Path) -> tuple[float, float]:
    """The same model, data and budget in a plain loop: a shuffled pass, one-cycle learning rate, AdamW."""
    started = time.monotonic()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    task = prepare(spec, locations(folder))
    assert task.eval is not None
    model = build_module(task, spec).model.train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=2e-3)
    steps = 4 * (PICTURES // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(4):
        order = torch.randperm(PICTURES).tolist()
        for start in range(0, PICTURES - 63, 64):
            inputs = task.train.micro_batch([SampleRef(epoch, at) for at in order[start : start + 64]]).inputs
            loss = functional.cross_entropy(model(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, task.eval.num_samples, 500):
            inputs = task.eval.micro_batch([SampleRef(0, at) for at in range(start, start + 500)]).inputs
            answers = model(pixel_values=inputs["pixel_values"]).logits.argmax(-1)
            right += int((answers == inputs["labels"]).sum())
    return right / task.eval.num_samples, time.monotonic() - started
