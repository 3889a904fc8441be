"""Pretraining on pictures without labels: masks, the loss, sizes that fit, and what becomes of such a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from google.protobuf import json_format

from helpers.picture_jobs import content, exported
from helpers.small_pictures import picture, write_folders
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.image_settings import default_settings
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
    "image_size": 32,
}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "deit": VIT,
    "swin": SWIN,
    "swinv2": SWIN,
    "focalnet": {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "image_size": 32},
}


def spec_of(
    folder: Path, model: dict[str, Any], task: str = "masked_image", **settings: Any
) -> tuple[spec_pb2.JobSpec, worker_pb2.Locations]:
    family = "pretraining" if task == "masked_image" else "fine_tuning"
    spec = {
        family: {task: settings},
        "model": model,
        "train_data": {"uri": str(folder / "data")},
        "optimization": {"max_steps": 2, "global_batch_size": 4},
    }
    locations = worker_pb2.Locations(cache_dir=str(folder / "cache"), data_roots=[str(folder)])
    return json_format.ParseDict(spec, spec_pb2.JobSpec()), locations


def fresh(kind: str, **overrides: Any) -> dict[str, Any]:
    return {"architecture": {"model_type": kind, "overrides": {**FAMILIES.get(kind, {}), **overrides}}}


def planned(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> worker_pb2.PlanResult:
    call = worker_pb2.PlanRequest(spec=spec, locations=locations)
    return worker_pb2.PlanResult.FromString(plan(call.SerializeToString()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folders(tmp_path / "data", 4, side=32)
    # Without labels it does not matter which folder a picture is in, or that it is in none.
    picture("rose", 77, side=32).save(tmp_path / "data" / "loose.png")
    return tmp_path


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_is_that_of_transformers_over_masked_pixels(kind: str, folder: Path) -> None:
    spec, locations = spec_of(folder, fresh(kind))
    task = prepare(spec, locations)
    assert task.train.num_samples + (task.eval.num_samples if task.eval else 0) == 13
    module = build_module(task, spec).eval()
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(4)])
    with torch.no_grad():
        found = module(**batch.inputs, return_outputs=True)
        theirs = module.model(
            pixel_values=batch.inputs["pixel_values"], bool_masked_pos=batch.inputs["mask"].flatten(1)
        ).loss
    assert float(found.loss_sum) / batch.num_units == pytest.approx(float(theirs), rel=1e-4)
    metrics = task.metrics()
    metrics.update(batch, found)
    numbers = metrics.compute([metrics.part()])
    assert numbers["loss"] == pytest.approx(float(theirs), rel=1e-4) and numbers["one_colour_loss"] > 0
    assert task.judge({"loss": 1.0, "one_colour_loss": 0.5}) and not task.judge({"loss": 0.4, "one_colour_loss": 0.5})


def test_one_colour_is_the_mean_of_what_is_seen(folder: Path) -> None:
    spec, locations = spec_of(folder, fresh("vit"))
    task = prepare(spec, locations)
    module = build_module(task, spec).eval()
    batch = task.train.micro_batch([SampleRef(0, 0)])
    pixels, mask = batch.inputs["pixel_values"][0], batch.inputs["mask"][0]
    masked = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    mean = pixels[:, ~masked].mean(1, keepdim=True)
    with torch.no_grad():
        found = module(**batch.inputs, return_outputs=True).outputs
    assert found is not None
    assert float(found["one_colour"]) == pytest.approx(float((pixels[:, masked] - mean).abs().mean()), rel=1e-5)


def test_masks_depend_on_seed_pass_and_picture_alone(folder: Path) -> None:
    spec, locations = spec_of(folder, fresh("vit"), mask_patch=8, mask_ratio=0.5, crop_scale=0.5)
    task = prepare(spec, locations)
    alone = [task.train.micro_batch([SampleRef(1, at)]).inputs for at in (0, 1, 2)]
    together = prepare(spec, locations).train.micro_batch([SampleRef(1, at) for at in (2, 0, 1)]).inputs
    for name in ("mask", "pixel_values"):
        assert torch.equal(torch.cat([each[name] for each in alone])[[2, 0, 1]], together[name])
    assert (together["mask"].sum((1, 2)) == 8).all()
    assert not torch.equal(task.train.micro_batch([SampleRef(2, 0)]).inputs["mask"], alone[0]["mask"])
    assert task.eval is not None
    held = task.eval.micro_batch([SampleRef(0, 0)]).inputs
    assert torch.equal(held["mask"], task.eval.micro_batch([SampleRef(0, 0)]).inputs["mask"])
    spec.optimization.seed = 5
    assert not torch.equal(
        prepare(spec, locations).train.micro_batch([SampleRef(1, 0), SampleRef(1, 1)]).inputs["mask"],
        torch.cat([each["mask"] for each in alone[:2]]),
    )


CHOSEN = [
    ("vit", {"image_size": 224, "patch_size": 16}, {}, (32, 0.6)),
    ("vit", {"image_size": 32, "patch_size": 8}, {}, (16, 0.6)),
    ("vit", {"image_size": 96, "patch_size": 48}, {}, (48, 0.6)),
    ("swin", {"image_size": 64}, {}, (32, 0.6)),
    ("swin", {"image_size": 64}, {"mask_patch": 4, "mask_ratio": 0.25}, (4, 0.25)),
    ("vit", {"patch_size": 8, "image_size": 224}, {"image_size": 48}, (24, 0.6)),
]


@pytest.mark.parametrize(("kind", "overrides", "settings", "wanted"), CHOSEN)
def test_masks_fit_picture_and_patches(
    kind: str, overrides: dict[str, Any], settings: dict[str, Any], wanted: tuple[int, float], folder: Path
) -> None:
    result = planned(*spec_of(folder, fresh(kind, **overrides), **settings))
    assert not result.violations, result.violations
    found = result.plan.resolved_spec.pretraining.masked_image
    assert (found.mask_patch, found.mask_ratio) == wanted
    assert found.image_size == settings.get("image_size", overrides.get("image_size"))


REFUSED = [
    (
        "resnet",
        {},
        {},
        "masked_image",
        "no head for masked pictures for resnet; use a model such as deit, focalnet, swin",
    ),
    ("bert", {}, {}, "masked_image", "no head for masked pictures for bert"),
    ("vit", {}, {"image_size": 30}, "masked_image.image_size", "a multiple of 8, the side of one position of this vit"),
    ("swin", {}, {"image_size": 36}, "masked_image.image_size", "a multiple of 8, the side"),
    ("vit", {}, {"image_size": 8}, "masked_image.image_size", "such as 16, 24"),
    ("vit", {}, {"mask_patch": 12}, "masked_image.mask_patch", "a multiple of 8, the model's patch_size"),
    ("vit", {}, {"mask_patch": 32}, "masked_image.mask_patch", "choose one of 8, 16"),
    ("vit", {"encoder_stride": 16}, {}, "overrides.encoder_stride", "leave it out, or give 8"),
]


@pytest.mark.parametrize(("kind", "overrides", "settings", "field", "said"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_does(
    kind: str, overrides: dict[str, Any], settings: dict[str, Any], *, field: str, said: str, folder: Path
) -> None:
    (violation,) = planned(*spec_of(folder, fresh(kind, **overrides), **settings)).violations
    assert violation.field.endswith(field) and said in violation.message, violation


def reasons(result: worker_pb2.PlanResult) -> set[str]:
    assert not result.violations, result.violations
    return {warning.reason for warning in result.plan.warnings}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pretrained_model_is_fine_tuned_and_embeds_but_predicts_nothing(kind: str, folder: Path) -> None:
    made = exported(folder / "pretrained", *spec_of(folder, fresh(kind)))
    inspected = worker_pb2.InspectModelResult.FromString(
        inspect_model(worker_pb2.InspectModelRequest(folder=str(made)).SerializeToString())
    )
    assert not inspected.violations and inspected.model.task == "masked_image" and not inspected.model.inputs
    instance = model_service_pb2.Instance(image=content(picture("rose", 5)))
    asked = worker_pb2.PredictCall(
        folder=str(made), request=model_service_pb2.PredictRequest(model="m", instances=[instance])
    )
    (violation,) = worker_pb2.PredictReply.FromString(predict(asked.SerializeToString())).violations
    assert (violation.field, violation.reason) == ("model", "TASK_MISMATCH")
    assert "fine-tune it for image_classification, or get vectors" in violation.message
    request = model_service_pb2.EmbedRequest(model="m", instances=[instance])
    embedded = worker_pb2.EmbedCall(folder=str(made), request=request)
    reply = worker_pb2.EmbedReply.FromString(embed(embedded.SerializeToString()))
    backbone = transformers.AutoModel.from_pretrained(made).eval()
    with torch.no_grad():
        inputs = transformers.AutoImageProcessor.from_pretrained(made, backend="pil")(
            picture("rose", 5), return_tensors="pt"
        )
        output = backbone(**inputs)
    wanted = output.last_hidden_state[0, 0] if kind in {"vit", "deit"} else output.pooler_output[0].flatten()
    assert list(reply.response.embeddings[0].values) == pytest.approx(wanted.tolist(), abs=1e-4)
    # Fine-tuning goes on with every weight of the backbone, and starts a head.
    (folder / "data" / "loose.png").unlink()
    spec, locations = spec_of(folder, {"uri": str(made)}, "image_classification")
    assert reasons(planned(spec, locations)) == {"NEW_HEAD"}
    tuned = build_module(prepare(spec, locations), spec).model.base_model.state_dict()
    own = {name: tensor for name, tensor in backbone.state_dict().items() if "pooler" not in name}
    assert own and all(torch.equal(tuned[name], tensor) for name, tensor in own.items() if "mask_token" not in name)
    # Pretraining goes on with the decoder, too.
    again, locations = spec_of(folder, {"uri": str(made)})
    assert reasons(planned(again, locations)) == set()
    classifier = exported(folder / "classifier", spec, locations)
    assert reasons(planned(*spec_of(folder, {"uri": str(classifier)}))) == {"NEW_HEAD"}


def test_a_backbone_gets_a_decoder_that_fits_and_a_trained_one_that_does_not_fit_is_refused(folder: Path) -> None:
    # The usual configuration of a ViT with patches of 8 has the encoder_stride of one with 16.
    config = transformers.ViTConfig(**VIT)
    transformers.ViTModel(config).save_pretrained(folder / "backbone")
    settings = json.dumps(default_settings((32, 32), 3).to_dict())
    (folder / "backbone" / "preprocessor_config.json").write_text(settings)
    spec, locations = spec_of(folder, {"uri": str(folder / "backbone")})
    assert reasons(planned(spec, locations)) == {"NEW_HEAD"}
    made = exported(folder / "made", spec, locations)
    found = json.loads((made / "config.json").read_text())
    assert found["encoder_stride"] == 8
    (made / "config.json").write_text(json.dumps({**found, "encoder_stride": 16}))
    (violation,) = planned(*spec_of(folder, {"uri": str(made)})).violations
    assert violation.reason == "MODEL_INVALID" and "encoder_stride" in violation.message
