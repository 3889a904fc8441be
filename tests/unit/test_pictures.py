"""Pictures: what folders and tables of them mean, and what is refused by name."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.picture_jobs import accepted, content, planned, spec_of
from helpers.small_pictures import CLASSES, picture, write_folders
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.ingredients import prepare


def as_folders(folder: Path) -> dict[str, Any]:
    write_folders(folder, 4)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "rose" / "Thumbs.db").write_bytes(b"x")
    (folder / "README.md").write_text("what this is")
    (folder / "__MACOSX" / "rose").mkdir(parents=True)
    (folder / "__MACOSX" / "rose" / "._001.jpg").write_bytes(b"x")
    return {}


def in_train(folder: Path) -> dict[str, Any]:
    as_folders(folder / "train")
    return {}


def wrapped(folder: Path) -> dict[str, Any]:
    write_folders(folder / "flowers" / "flowers", 4)
    return {}


def chosen_below(folder: Path) -> dict[str, Any]:
    write_folders(folder / "train", 4)
    write_folders(folder / "test", 2)
    return {"path": "train"}


def with_csv(folder: Path) -> dict[str, Any]:
    return _described(folder, "metadata.csv", lambda rows: "file_name,label\n" + "".join(f"{a},{b}\n" for a, b in rows))


def with_jsonl(folder: Path) -> dict[str, Any]:
    rows: Callable[[list[tuple[str, str]]], str] = lambda rows: "".join(  # noqa: E731
        f'{{"file_name": "{a}", "label": "{b}"}}\n' for a, b in rows
    )
    return _described(folder, "metadata.jsonl", rows)


def _described(folder: Path, name: str, write: Callable[[list[tuple[str, str]]], str]) -> dict[str, Any]:
    folder.mkdir()
    rows = []
    for kind in CLASSES:
        for number in range(4):
            picture(kind, number).save(folder / f"{kind[0]}{number}.png")
            rows.append((f"{kind[0]}{number}.png", kind))
    (folder / name).write_text(write(rows))
    return {}


def as_parquet(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    names = list(reversed(CLASSES))  # Numbers by this order, classes sorted by name: a mix-up would show.
    rows = [
        ({"bytes": content(picture(kind, n)), "path": f"{n}.png"}, names.index(kind))
        for n in range(4)
        for kind in CLASSES
    ]
    table = pa.table({"image": [row[0] for row in rows], "label": [row[1] for row in rows]})
    about = b'{"info": {"features": {"label": {"names": %s, "_type": "ClassLabel"}}}}'
    listed = str(names).replace("'", '"').encode()
    pq.write_table(table.replace_schema_metadata({b"huggingface": about % listed}), folder / "a.parquet")
    return {}


LAYOUTS = [as_folders, in_train, wrapped, chosen_below, with_csv, with_jsonl, as_parquet]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_pictures_in_any_layout_have_the_same_classes(write: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    found = accepted(folder, write(folder))
    assert list(found.labels) == list(CLASSES)
    assert found.num_train_samples + found.num_eval_samples == 12
    # Planned again as resolved, the numbers of a table still mean the same classes.
    task = prepare(found.resolved_spec, spec_of(folder, {})[1])
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(task.train.num_samples)])
    bright = batch.inputs["pixel_values"].mean((2, 3))
    for name, label in zip(CLASSES, range(3), strict=True):
        expected = np.argmax(CLASSES[name]) if name != "daisy" else None
        if expected is not None:
            assert set(bright[batch.inputs["labels"] == label].argmax(1).tolist()) == {int(expected)}


def write_idx(folder: Path, stem: str, number: int, *, labels: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (number, 10, 8), dtype=np.uint8)
    written = struct.pack(">4B3I", 0, 0, 8, 3, number, 10, 8) + pixels.tobytes()
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(written))
    count = number if labels is None else labels
    written = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(at % 3 for at in range(count))
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(written)


def test_idx_files_are_read_as_pairs_and_numbers_get_the_names_of_the_spec(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    write_idx(folder, "train", 30)
    write_idx(folder, "t10k", 6)
    held = {"eval_data": {"uri": str(folder), "path": "t10k-images-idx3-ubyte.gz"}}
    names = ["shirt", "coat", "bag"]
    found = accepted(folder, {"path": "train-images-idx3-ubyte.gz"}, labels=names, more=held)
    assert (found.num_train_samples, found.num_eval_samples) == (30, 6)
    assert list(found.labels) == names
    both = accepted(folder)
    assert list(both.labels) == ["0", "1", "2"]
    assert "TEST_DATA_TRAINED_ON" in {warning.reason for warning in both.warnings}


def broken(folder: Path) -> dict[str, Any]:
    write_folders(folder, 3)
    whole = (folder / "rose" / "000.jpg").read_bytes()
    (folder / "rose" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "rose" / "empty.png").write_bytes(b"")
    (folder / "violet" / "page.jpg").write_bytes(b"<!doctype html><p>404")
    return {}


def bomb(folder: Path) -> dict[str, Any]:
    write_folders(folder, 3)
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (header, b"IDATx")
    ]
    (folder / "rose" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return {}


def empty_class(folder: Path) -> dict[str, Any]:
    write_folders(folder, 3)
    (folder / "tulip").mkdir()
    (folder / "tulip" / "IMG_1.zip").write_bytes(b"x")
    return {}


def not_decoded(folder: Path) -> dict[str, Any]:
    write_folders(folder, 3)
    (folder / "rose" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "violet" / "a.avif").write_bytes(b"\0\0\0\x1cftypavif")
    return {}


def one_class(folder: Path) -> dict[str, Any]:
    write_folders(folder / "x", 3)
    return {"path": "x/rose"}


def no_classes(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    picture("rose", 1).save(folder / "a.png")
    picture("rose", 2).save(folder / "b.png")
    return {}


def some_unlabelled(folder: Path) -> dict[str, Any]:
    with_csv(folder)
    picture("rose", 9).save(folder / "late.png")
    return {}


def missing_picture(folder: Path) -> dict[str, Any]:
    with_csv(folder)
    (folder / "r1.png").unlink()
    return {}


def two_readings(folder: Path) -> dict[str, Any]:
    write_folders(folder / "garden", 2)
    write_folders(folder / "wild", 2)
    return {}


def split_beside_others(folder: Path) -> dict[str, Any]:
    write_folders(folder / "train", 2)
    (folder / "extra").mkdir()
    picture("rose", 1).save(folder / "extra" / "a.png")
    return {}


def split_without_classes(folder: Path) -> dict[str, Any]:
    write_folders(folder / "train", 2)
    (folder / "test").mkdir()
    picture("rose", 1).save(folder / "test" / "a.png")
    return {}


def other_labels(folder: Path) -> dict[str, Any]:
    write_idx(folder, "train", 30, labels=29)
    return {}


def only_pictures_of_idx(folder: Path) -> dict[str, Any]:
    write_idx(folder, "train", 30)
    (folder / "train-labels-idx1-ubyte").unlink()
    return {}


def paths_in_parquet(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    pq.write_table(
        pa.table(
            {"image": [{"bytes": None, "path": "/etc/passwd"}] * 3, "label": [0, 1, 0]},
            schema=pa.schema(
                [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
            ),
        ),
        folder / "a.parquet",
    )
    return {}


def texts(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "a.csv").write_text("text,label\ngood,1\nbad,0\n")
    return {}


BAD: list[tuple[Callable[[Path], dict[str, Any]], list[str]]] = [
    (
        broken,
        [
            "rose/cut.jpg: the picture is cut short or damaged",
            "rose/empty.png: the file is empty",
            "violet/page.jpg: not a JPEG, PNG",
        ],
    ),
    (bomb, ["rose/bomb.png:", "pixels; a picture has at most 67,108,864"]),
    (empty_class, ["the folder tulip has no pictures: it has IMG_1.zip"]),
    (not_decoded, [f"{name}: not a JPEG, PNG, WebP" for name in ("rose/IMG_1.HEIC", "violet/a.avif")]),
    (one_class, ["not in a class folder"]),
    (no_classes, ["a.png: the picture has no class"]),
    (some_unlabelled, ["1 pictures have no row in metadata.csv: late.png"]),
    (missing_picture, ["metadata.csv, line 7: there is no picture 'r1.png'"]),
    (two_readings, ["the class may be the outer folder (garden, wild) or the inner one (daisy"]),
    (split_beside_others, ["the folder train has class folders, but is next to extra"]),
    (split_without_classes, ["test/a.png: test has pictures without a class folder", "with path"]),
    (other_labels, ["30 pictures, but train-labels-idx1-ubyte has 29 labels"]),
    (only_pictures_of_idx, ["the folder has no train-labels-idx1-ubyte.gz with its labels"]),
    (paths_in_parquet, ["a.parquet, line 1: the picture names a file outside of the table"]),
    (texts, ["a.csv: not pictures; give a folder of pictures"]),
]


@pytest.mark.parametrize(("write", "said"), BAD, ids=lambda each: getattr(each, "__name__", ""))
def test_bad_pictures_are_refused_with_their_file(
    write: Callable[[Path], dict[str, Any]], said: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    found = planned(folder, write(folder)).violations
    messages = "\n".join(each.message for each in found)
    assert found and all(each.field.startswith("spec.train_data") for each in found), found
    for part in said:
        assert part in messages, messages


def test_a_class_that_only_the_evaluation_data_has_is_refused_and_a_missing_one_shifts_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_folders(folder / "train", 3)
    write_folders(folder / "test", 2)
    held = {"eval_data": {"uri": str(folder), "path": "test"}}
    for path in (folder / "test" / "daisy").iterdir():
        path.unlink()
    (folder / "test" / "daisy").rmdir()
    spec = accepted(folder, {"path": "train"}, more=held).resolved_spec
    task = prepare(spec, spec_of(folder, {})[1])
    assert task.eval is not None
    assert task.eval.micro_batch([SampleRef(0, 0)]).inputs["labels"].tolist() == [1]
    (folder / "test" / "tulip").mkdir()
    picture("rose", 1).save(folder / "test" / "tulip" / "1.png")
    (violation,) = planned(folder, {"path": "train"}, more=held).violations
    assert violation.field == "spec.eval_data" and "'tulip' is none of: daisy, rose, violet" in violation.message


MODELS = [
    ("gpt2", {}, "gpt2 is not a picture model; use one such as vit, deit"),
    ("timm_wrapper", {}, "timm"),
    (
        "swin",
        {"image_size": 24, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "num_channels": 4},
        "num_channels is 4",
    ),
]


@pytest.mark.parametrize(("kind", "overrides", "said"), MODELS, ids=lambda each: str(each)[:12])
def test_a_model_that_does_not_read_pictures_is_refused_with_those_that_do(
    kind: str, overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_folders(tmp_path / "data", 3)
    model = {"architecture": {"model_type": kind, "overrides": overrides}}
    found = planned(tmp_path / "data", {}, more={"model": model}).violations
    assert said in "\n".join(each.message for each in found), found


def test_a_text_task_refuses_pictures_and_a_model_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_folders(folder, 3)
    spec, locations = spec_of(folder, {})
    spec.fine_tuning.text_classification.SetInParent()
    result = worker_pb2.PlanResult.FromString(
        plan(worker_pb2.PlanRequest(spec=spec, locations=locations).SerializeToString())
    )
    said = {each.field: each.message for each in result.violations}
    assert "resnet does not give one vector for each token" in said["spec.fine_tuning.text_classification"]
    spec.model.architecture.model_type = "bert"
    spec.model.architecture.overrides.Clear()
    spec.tokenizer.train.SetInParent()
    result = worker_pb2.PlanResult.FromString(
        plan(worker_pb2.PlanRequest(spec=spec, locations=locations).SerializeToString())
    )
    assert "a picture, but the task reads a table or texts" in result.violations[0].message


def test_what_training_changes_depends_on_seed_pass_and_picture_alone(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", 6)
    spec, locations = spec_of(tmp_path / "data", {}, crop_scale=0.3, flip=0.5)
    first, again = prepare(spec, locations).train, prepare(spec, locations).train
    alone = [first.micro_batch([SampleRef(1, at)]).inputs["pixel_values"][0] for at in (0, 1, 2)]
    together = again.micro_batch([SampleRef(1, at) for at in (2, 0, 1)]).inputs["pixel_values"]
    assert torch.equal(torch.stack(alone)[[2, 0, 1]], together)
    assert not torch.equal(first.micro_batch([SampleRef(2, 0)]).inputs["pixel_values"][0], alone[0])
    spec.optimization.seed = 1
    assert not torch.equal(
        prepare(spec, locations).train.micro_batch([SampleRef(1, 0)]).inputs["pixel_values"][0], alone[0]
    )
    held = prepare(spec, locations).eval
    assert held is not None
    for epoch in (0, 3):
        pixels = held.micro_batch([SampleRef(epoch, 0)]).inputs["pixel_values"]
        assert torch.equal(pixels, held.micro_batch([SampleRef(0, 0)]).inputs["pixel_values"])


def test_the_same_bytes_in_other_class_folders_are_other_data(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_folders(folder, 3)
    before = accepted(folder)
    (folder / "rose").rename(folder / "x")
    (folder / "violet").rename(folder / "rose")
    (folder / "x").rename(folder / "violet")
    assert accepted(folder).data_fingerprint != before.data_fingerprint


def test_several_labels_are_read_from_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    _described(folder, "metadata.csv", lambda rows: "file_name,labels\n" + "".join(f"{a},{b}|plant\n" for a, b in rows))
    found = accepted(folder, problem="PROBLEM_MULTI_LABEL")
    assert list(found.labels) == ["daisy", "plant", "rose", "violet"]
