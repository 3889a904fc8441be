"""An ImageNet model from the Python index, as a repository of PyTorch Hub: it learns new pictures in a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardyard
from helpers.beside import script
from helpers.served import served
from helpers.small_pictures import write_folders

assets = script("examples/quickstart", "assets")
pytestmark = pytest.mark.prove

NUM_PARAMETERS = 4_652_008
"""As published (github.com/tensorflow/tpu, EfficientNet-lite0), with 1,000 classes."""

WIDTH = 1280


def test_an_efficientnet_trained_on_imagenet_learns_three_kinds_of_pictures(tmp_path: Path) -> None:
    try:
        repository = assets.efficientnet_folder()
    except assets.AssetsUnavailable as error:
        pytest.skip(str(error))
    write_folders(tmp_path / "garden", 12, side=48)
    held_out = write_folders(tmp_path / "held", 4, first=200, side=48)
    options = ["--data-root", str(repository), "--torch-hub-repo", str(repository)]
    with served(tmp_path / "service", "local", *options) as service, shardyard.Client(service.address) as client:
        spec = shardyard.JobSpec(
            shardyard.ImageClassification(image_size=64),
            model=shardyard.TorchHub(repository, "efficientnet_lite0"),
            train_data=tmp_path / "garden",
            eval_data=tmp_path / "held",
            # After a few steps its norms are still evaluated with the statistics of ImageNet.
            optimization=shardyard.Optimization(epochs=30, learning_rate=1e-3, global_batch_size=12),
        )
        # Its layer of 1,000 classes is replaced by one of three.
        assert client.plan(spec).num_parameters == NUM_PARAMETERS - 997 * (WIDTH + 1)
        assert client.submit(spec, job_id="lite").wait(timeout=900).state == "succeeded"
        model = client.model("lite")
        assert model.info.metrics["accuracy"] > 0.9
        answers = model.predict(held_out)
        assert sum(answer.label == path.parent.name for answer, path in zip(answers, held_out, strict=True)) > 10
