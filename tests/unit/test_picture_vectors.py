"""Vectors of pictures: what each architecture has as the vector of a picture, by Embed and as features."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from google.protobuf import json_format
from PIL import Image

from helpers.extractions import Recorder, extract
from helpers.picture_jobs import content
from helpers.small_pictures import picture, write_folders
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed
from shardyard_trainer.inputs.image_settings import default_settings
from shardyard_trainer.planning.plan import plan

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
WHOLE = spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE

Expected = Callable[[Any], torch.Tensor]
OWN: Expected = lambda output: output.pooler_output.flatten(1)  # noqa: E731
CLASS: Expected = lambda output: output.last_hidden_state[:, 0]  # noqa: E731
FAMILIES: dict[str, tuple[dict[str, Any], Expected]] = {
    "vit": (VIT, CLASS),
    "deit": (VIT, CLASS),
    "dinov2": (VIT, OWN),
    "dinov2_with_registers": (VIT, OWN),
    "beit": (VIT, OWN),
    "swin": (SWIN, OWN),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}, OWN),
    "convnext": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, OWN),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, OWN),
    "segformer": (
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]},
        lambda output: output.last_hidden_state.mean((2, 3)),
    ),
    "ijepa": (VIT, lambda output: output.last_hidden_state.mean(1)),
}
PICTURES = [content(picture("rose", 1)), content(picture("violet", 2)), content(picture("daisy", 3))]


def save_backbone(folder: Path, kind: str, overrides: dict[str, Any]) -> Path:
    config = transformers.CONFIG_MAPPING[kind](**overrides)
    if hasattr(config, "image_size"):
        config.image_size = 32
    torch.manual_seed(1)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    settings = default_settings((32, 32), 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings.to_dict()))
    return folder


def ask(folder: Path, *pictures: bytes, **options: Any) -> worker_pb2.EmbedReply:
    instances = [pb.Instance(image=each) for each in pictures]
    request = pb.EmbedRequest(model="m", instances=instances, **options)
    return worker_pb2.EmbedReply.FromString(
        embed(worker_pb2.EmbedCall(folder=str(folder), request=request).SerializeToString())
    )


def vectors_of(reply: worker_pb2.EmbedReply) -> np.ndarray:
    assert not reply.violations, reply.violations
    return np.stack([np.reshape(each.values, tuple(each.shape)) for each in reply.response.embeddings])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_picture_has_the_vector_that_its_architecture_has_for_it(kind: str, tmp_path: Path) -> None:
    overrides, expected = FAMILIES[kind]
    folder = save_backbone(tmp_path, kind, overrides)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    shown = [picture("rose", 1), picture("violet", 2), picture("daisy", 3)]
    with torch.no_grad():
        output = model(**processor(shown, return_tensors="pt"))
    np.testing.assert_allclose(vectors_of(ask(folder, *PICTURES)), expected(output).numpy(), atol=2e-5)
    hidden = output.last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
    np.testing.assert_allclose(vectors_of(ask(folder, *PICTURES, output=WHOLE)), hidden.numpy(), atol=2e-5)
    scaled = torch.nn.functional.normalize(expected(output), dim=-1)
    np.testing.assert_allclose(vectors_of(ask(folder, *PICTURES, normalize=True)), scaled.numpy(), atol=2e-5)


def test_other_poolings_are_over_places_and_what_a_model_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "vit", "dinov2_with_registers", VIT)
    whole = vectors_of(ask(folder, *PICTURES, output=WHOLE))
    places = whole[:, 5:]  # Behind the class token are four registers.
    np.testing.assert_allclose(vectors_of(ask(folder, *PICTURES, pooling="POOLING_MEAN")), places.mean(1), atol=1e-5)
    np.testing.assert_allclose(vectors_of(ask(folder, *PICTURES, pooling="POOLING_MAX")), places.max(1), atol=1e-5)
    swin = save_backbone(tmp_path / "swin", "swin", SWIN)
    found = ask(swin, PICTURES[0], pooling="POOLING_CLS", max_length=5).violations
    assert {each.field for each in found} == {"pooling", "max_length"}
    assert "swin has no class token; choose mean or max" in found[1].message
    assert "no last token" in ask(swin, PICTURES[0], pooling="POOLING_LAST").violations[0].message


def test_what_is_not_a_picture_is_refused_by_its_place(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path, "vit", VIT)
    found = ask(folder, PICTURES[0], b"GIF89a", b"").violations
    assert [(each.field, each.reason) for each in found] == [
        ("instances[1].image", "DATA_INVALID"),
        ("instances[2].image", "DATA_INVALID"),
    ]
    call = worker_pb2.EmbedCall(
        folder=str(folder), request=pb.EmbedRequest(model="m", instances=[pb.Instance(text="rose.jpg")])
    )
    (violation,) = worker_pb2.EmbedReply.FromString(embed(call.SerializeToString())).violations
    assert violation.reason == "TASK_MISMATCH" and "reads pictures" in violation.message
    call.max_response_bytes = 50
    call.request.instances[0].image = PICTURES[0]
    (violation,) = worker_pb2.EmbedReply.FromString(embed(call.SerializeToString())).violations
    assert violation.reason == "RESPONSE_TOO_LARGE"


def in_folders(folder: Path) -> tuple[list[bytes], list[str]]:
    paths = write_folders(folder, 3, ending=".png")
    (folder / "notes.txt").write_text("not a picture")
    return [path.read_bytes() for path in paths], [str(path.relative_to(folder)) for path in paths]


def beside_metadata(folder: Path) -> tuple[list[bytes], list[str]]:
    folder.mkdir()
    for at, each in enumerate(PICTURES):
        (folder / f"{at}.png").write_bytes(each)
    (folder / "metadata.csv").write_text("file_name,label\n2.png,b\n")
    return PICTURES, ["0.png", "1.png", "2.png"]


def in_parquet(folder: Path) -> tuple[list[bytes], list[str]]:
    folder.mkdir()
    cells = [{"bytes": each, "path": None if at else "rose.png"} for at, each in enumerate(PICTURES)]
    pq.write_table(pa.table({"image": cells}), folder / "a.parquet")
    return PICTURES, ["rose.png", "a.parquet:2", "a.parquet:3"]


def in_idx(folder: Path) -> tuple[list[bytes], list[str]]:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 10, 8), dtype=np.uint8)
    header = struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape)
    (folder / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    named = [f"train-images-idx3-ubyte:{number}" for number in (1, 2, 3)]
    return [content(Image.fromarray(each)) for each in pixels], named


@pytest.mark.parametrize("write", [in_folders, beside_metadata, in_parquet, in_idx], ids=lambda each: each.__name__)
def test_features_of_any_source_of_pictures_are_those_of_embed_beside_their_paths(
    write: Callable[[Path], tuple[list[bytes], list[str]]], tmp_path: Path
) -> None:
    pictures, names = write(tmp_path / "data")
    model = save_backbone(tmp_path / "model", "vit", VIT)
    (tmp_path / "job").mkdir()
    spec = spec_pb2.JobSpec(
        feature_extraction=spec_pb2.FeatureExtraction(data=spec_pb2.DataSource(uri=str(tmp_path / "data"))),
        model=spec_pb2.ModelSource(uri=str(model)),
    )
    locations = worker_pb2.Locations(data_roots=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))
    call = worker_pb2.PlanRequest(spec=spec, locations=locations)
    result = worker_pb2.PlanResult.FromString(plan(call.SerializeToString()))
    assert not result.violations, result.violations
    resolved = result.plan.resolved_spec.feature_extraction
    assert resolved.pooling == spec_pb2.POOLING_CLS and not resolved.HasField("max_length")
    assert result.plan.num_train_samples == len(pictures)
    attempt = worker_pb2.AttemptSpec(
        epoch=1,
        spec=spec,
        plan=result.plan,
        locations=locations,
        job_dir=str(tmp_path / "job"),
        export_dir=str(tmp_path / "out"),
    )
    assert extract(attempt, Recorder()).kinds()[-1] == "exported"
    rows = pq.read_table(tmp_path / "out" / "features-000000.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(len(pictures)))
    assert [row["path"] for row in rows] == names
    vectors = vectors_of(ask(model, *pictures))
    np.testing.assert_allclose(np.asarray([row["vector"] for row in rows]), vectors, atol=1e-5)
    about = json.loads((tmp_path / "out" / "_features.json").read_text())
    assert (about["rows"], about["width"], about["pooling"]) == (len(pictures), 16, "cls")


def test_pictures_that_do_not_decode_and_settings_of_texts_are_refused_before_a_job_queues(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 2)
    (tmp_path / "data" / "rose" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    model = save_backbone(tmp_path / "model", "resnet", FAMILIES["resnet"][0])
    spec = {
        "feature_extraction": {"data": {"uri": str(tmp_path / "data")}, "pooling": "POOLING_CLS", "max_length": 9},
        "model": {"uri": str(model)},
    }
    locations = worker_pb2.Locations(data_roots=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))

    def violations(spec: dict[str, Any]) -> list[str]:
        call = worker_pb2.PlanRequest(spec=json_format.ParseDict(spec, spec_pb2.JobSpec()), locations=locations)
        found = worker_pb2.PlanResult.FromString(plan(call.SerializeToString())).violations
        return [f"{each.field}: {each.message}" for each in found]

    found = violations(spec)
    assert [each.split(":")[0] for each in found] == [
        "spec.feature_extraction.max_length",
        "spec.feature_extraction.pooling",
    ]
    del spec["feature_extraction"]["pooling"], spec["feature_extraction"]["max_length"]
    (message,) = violations(spec)
    assert message.startswith("spec.feature_extraction.data: rose/cut.jpg: ")
