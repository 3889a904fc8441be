"""Exports of modules of PyTorch Hub for pictures: they answer, by the code of their card too, and are trained again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.hub_plans import job, places, planned
from helpers.picture_jobs import exported
from helpers.small_pictures import write_folders
from helpers.torch_hub_nets import NET
from helpers.torch_hub_repos import write_repository
from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict

CASES = {
    "torch_hub_pictures-convolution": "nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 10, 1),\n"
    "        nn.AdaptiveAvgPool2d(1), nn.Flatten())",
    "torch_hub_pictures-compiled": "torch.compile(Net())",
    "torch_hub_picture_vectors-vectors": "nn.Sequential(*list(Net().children())[:-1], nn.AdaptiveAvgPool2d(1),\n"
    "        nn.Flatten())",
}


@pytest.mark.parametrize("case", CASES)
def test_an_export_answers_as_its_card_computes_and_is_trained_again(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_folders(tmp_path / "garden", 4)
    hub = write_repository(tmp_path / "hub", hubconf=f"{NET}def f():\n    return {CASES[case]}")
    locations = places(tmp_path, tmp_path, hub)
    spec = planned(job(tmp_path, {"repo": str(hub), "entrypoint": "f"}, side=24), locations).plan.resolved_spec
    folder = exported(tmp_path / "made", spec, locations, metric="accuracy")
    picture = paths[0].read_bytes()
    question = model_service_pb2.PredictRequest(instances=[model_service_pb2.Instance(image=picture)])
    call = worker_pb2.PredictCall(folder=str(folder), request=question, torch_hub=[str(hub)])
    answer = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    (logits,) = [list(each.logits) for each in answer.response.predictions]
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder / "picture.png").write_bytes(picture)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"][0].tolist() == pytest.approx(logits, abs=1e-4)
    (folder / "picture.png").unlink()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == case.partition("-")[0]
    vectors = worker_pb2.EmbedCall(folder=str(folder), torch_hub=[str(hub)])
    vectors.request.instances.add(image=picture)
    found = worker_pb2.EmbedReply.FromString(embed(vectors.SerializeToString()))
    if config["model_type"] == "torch_hub_picture_vectors":
        assert len(found.response.embeddings[0].values) == 8
    else:
        assert "gives classes for pictures" in found.violations[0].message
    spec.model.model = "m"
    locations.folders["m"] = str(folder)
    again = planned(spec, locations)
    assert not again.violations and "NEW_HEAD" not in {warning.reason for warning in again.plan.warnings}


def test_a_picture_model_of_transformers_without_a_preprocessor_has_the_defaults_in_its_own_size(
    tmp_path: Path,
) -> None:
    write_folders(tmp_path / "garden", 4)
    code = """
from transformers import ViTConfig, ViTForImageClassification
def f():
    return ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, image_size=32, patch_size=8)).half()
"""
    hub = write_repository(tmp_path / "hub", hubconf=code)
    result = planned(job(tmp_path, {"repo": str(hub), "entrypoint": "f"}, side=0), places(tmp_path, tmp_path, hub))
    assert not result.violations and result.plan.resolved_spec.fine_tuning.image_classification.image_size == 32
