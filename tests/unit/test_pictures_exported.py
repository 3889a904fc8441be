"""Models of pictures as folders: exported by every family, asked in plain transformers, and trained again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from helpers.picture_jobs import exported
from helpers.small_pictures import picture, write_folders
from shardyard.v1 import model_service_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

STEP: Any = {"rate": 0.01, "metric": "accuracy"}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "beit": VIT,
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
    "swin": {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "grey resnet": {
        "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_channels": 1,
    },
}  # fmt: skip


def spec_of(folder: Path, model: dict[str, Any], **task: Any) -> tuple[spec_pb2.JobSpec, worker_pb2.Locations]:
    spec = {
        "fine_tuning": {"image_classification": task},
        "model": model,
        "train_data": {"uri": str(folder / "data")},
        "optimization": {"max_steps": 2, "global_batch_size": 4},
    }
    locations = worker_pb2.Locations(cache_dir=str(folder / "cache"), data_roots=[str(folder)])
    return json_format.ParseDict(spec, spec_pb2.JobSpec()), locations


def asked(folder: Path, *pictures: bytes) -> worker_pb2.PredictReply:
    instances = [model_service_pb2.Instance(image=each) for each in pictures]
    call = worker_pb2.PredictCall(folder=str(folder), request=model_service_pb2.PredictRequest(instances=instances))
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def planned(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> worker_pb2.PlanResult:
    call = worker_pb2.PlanRequest(spec=spec, locations=locations)
    return worker_pb2.PlanResult.FromString(plan(call.SerializeToString()))


CHECKPOINT = "a ResNet of TensorFlow"


def model_of(family: str, folder: Path) -> dict[str, Any]:
    """The source of a fresh model of the family, or of a checkpoint."""
    if family == CHECKPOINT:
        shutil.copytree(Path(__file__).parents[1] / "checkpoints/resnet_10", folder / "tensorflow")
        return {"checkpoint": {"uri": str(folder / "tensorflow")}}
    return {"architecture": {"model_type": family.rpartition(" ")[2], "overrides": FAMILIES[family]}}


@pytest.mark.parametrize("family", [*FAMILIES, CHECKPOINT])
def test_every_family_is_exported_and_answers_pictures_of_any_size(family: str, tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 4)
    spec, locations = spec_of(tmp_path, model_of(family, tmp_path), image_size=32)
    folder = exported(tmp_path / "model", spec, locations, **STEP)
    large = tmp_path / "large.png"
    picture("rose", 5, side=70).save(large)
    reply = asked(folder, large.read_bytes(), (tmp_path / "data" / "rose" / "001.jpg").read_bytes())
    assert not reply.violations
    for answer in reply.response.predictions:
        assert [each.label for each in answer.classification.scores] == ["daisy", "rose", "violet"]
        assert sum(each.score for each in answer.classification.scores) == pytest.approx(1)
    result = worker_pb2.InspectModelResult.FromString(
        inspect_model(worker_pb2.InspectModelRequest(folder=str(folder)).SerializeToString())
    )
    assert not result.violations and result.model.task == "image_classification"
    assert result.model.inputs == ["image"]


@pytest.mark.parametrize("family", ["vit", "grey resnet", CHECKPOINT])
def test_the_cards_code_gives_the_answer_of_predict_in_another_process(family: str, tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 4)
    folder = exported(tmp_path / "model", *spec_of(tmp_path, model_of(family, tmp_path), image_size=32), **STEP)
    picture("violet", 7, side=50).save(folder / "picture.png")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(logits[0].tolist())"],
        cwd=folder, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    logits = asked(folder, (folder / "picture.png").read_bytes()).response.predictions[0].logits
    found = [float(each) for each in done.stdout.strip().strip("[]").split(",")]
    assert found == pytest.approx(list(logits), abs=1e-4)


def test_a_trained_folder_is_trained_again_with_its_head_or_with_a_new_one(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 4)
    model = {"architecture": {"model_type": "vit", "overrides": VIT}}
    first = exported(tmp_path / "first", *spec_of(tmp_path, model, image_size=32), **STEP)
    again, locations = spec_of(tmp_path, {"uri": str(first)})
    again.fine_tuning.freeze.backbone = True
    result = planned(again, locations)
    assert not result.violations, result.violations
    assert result.plan.resolved_spec.fine_tuning.image_classification.image_size == 32
    assert "NEW_HEAD" not in reasons(result.plan)
    module = build_module(prepare(again, locations), again)
    assert {
        name.partition(".")[2].partition(".")[0] for name, each in module.named_parameters() if each.requires_grad
    } == {"classifier"}
    (tmp_path / "data" / "rose").rename(tmp_path / "data" / "tulip")
    other = planned(again, locations)
    assert "NEW_HEAD" in reasons(other.plan) and list(other.plan.labels) == ["daisy", "tulip", "violet"]
    again.fine_tuning.image_classification.image_size = 48
    (violation,) = planned(again, locations).violations
    assert (
        violation.field == "spec.fine_tuning.image_classification.image_size"
        and "its own size is 32" in violation.message
    )
    (first / "preprocessor_config.json").unlink()
    (violation,) = planned(again, locations).violations
    assert "preprocessor_config.json" in violation.message and violation.reason == "MODEL_INVALID"


def reasons(found: plan_pb2.JobPlan) -> set[str]:
    return {warning.reason for warning in found.warnings}


def test_bytes_that_are_not_a_picture_are_refused_one_by_one(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 4)
    model = {"architecture": {"model_type": "resnet", "overrides": FAMILIES["resnet"]}}
    folder = exported(tmp_path / "model", *spec_of(tmp_path, model, image_size=32), **STEP)
    whole = (tmp_path / "data" / "rose" / "001.jpg").read_bytes()
    reply = asked(folder, whole, whole[:200], b"%PDF-1.4", b"x" * 4_000_001)
    assert [each.field for each in reply.violations] == ["instances[3].image"]
    reply = asked(folder, whole, whole[:200], b"%PDF-1.4")
    assert [each.field for each in reply.violations] == ["instances[1].image", "instances[2].image"]
    assert "not a JPEG, PNG" in reply.violations[1].message
