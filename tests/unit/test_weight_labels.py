"""The labels that a head's config.json has: taken, kept in their order, or refused, the same at upload and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers import small_specs, tiny_folders
from helpers.folder_doors import asked, inspected, planned, set_config, spec_for
from helpers.small_pictures import write_folders
from helpers.small_specs import classification_spec, locations, parse, write_labelled
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare


@pytest.mark.parametrize(
    ("names", "rows", "labels"),
    [
        ({"0": "good", "1": "bad"}, None, ["good", "bad"]),
        ({"0": "bad", "1": "good"}, None, ["bad", "good"]),
        ({"0": "c", "1": "a", "2": "b"}, "abc", ["c", "a", "b"]),
    ],
)
def test_the_heads_own_order_of_labels_is_taken_if_the_data_has_the_same(
    tmp_path: Path, names: dict[str, str], rows: str | None, labels: list[str]
) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification", num_labels=len(names))
    set_config(id2label=names, label2id={name: int(key) for key, name in names.items()})(folder)
    head = load_file(folder / "model.safetensors")["classifier.weight"]
    words = tiny_folders.WORDS
    texts = [f"{words[i % len(words)]} {words[i // len(words)]}" for i in range(60)]
    chosen = rows or ("bad", "good")
    data = write_labelled(tmp_path / "a.csv", [(text, chosen[i % len(chosen)]) for i, text in enumerate(texts)])
    spec = classification_spec(data, {"uri": str(folder)})
    result = planned(tmp_path, spec)
    assert (list(result.plan.labels), [w.reason for w in result.plan.warnings]) == (labels, [])
    again = planned(tmp_path, result.plan.resolved_spec)
    assert again.plan.resolved_spec == result.plan.resolved_spec
    task = prepare(spec, locations(tmp_path))
    module = build_module(task, spec)
    assert torch.equal(module.model.classifier.weight, head)
    found = task.train.micro_batch([SampleRef(0, index) for index in range(task.train.num_samples)]).inputs["labels"]
    assert set(found.tolist()) == set(range(len(labels)))


@pytest.mark.parametrize(
    ("names", "rows", "step"),
    [
        ({"0": "x", "1": "y"}, "ab", "set new_head for a new one"),
        ({"0": "b", "1": "a", "2": "c"}, "ab", "set labels to ['b', 'a', 'c'] to keep it"),
        ({"0": "A", "1": "B"}, "ab", "write the data's labels as the head has them"),
    ],
)
def test_a_head_of_other_labels_is_refused_with_the_next_step(
    tmp_path: Path, names: dict[str, str], rows: str, step: str
) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification", num_labels=len(names))
    set_config(id2label=names)(folder)
    texts = small_specs.sentences(60)
    data = write_labelled(tmp_path / "a.csv", [(text, rows[i % 2]) for i, text in enumerate(texts)])
    (refused,) = planned(tmp_path, classification_spec(data, {"uri": str(folder)})).violations
    assert refused.reason == "LABEL_MISMATCH" and step in refused.message


def test_a_number_of_labels_without_names_is_that_number(tmp_path: Path) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification", num_labels=3)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["id2label"], config["label2id"]
    path.write_text(json.dumps({**config, "num_labels": 3}))
    assert list(inspected(folder).model.labels) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert len(asked(folder, "a dog").response.predictions[0].logits) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "Good", "1": "good"}}, "only its case differs"),
        ({"id2label": {"0": "good", "1": "good"}}, "'good' twice"),
        ({"id2label": {"0": "a", "2": "b"}}, "number the head's outputs from 0"),
        ({"id2label": {"a": 0, "b": 1}}, "keys are not numbers"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels 3, but 2 names"),
    ],
)
def test_labels_that_cannot_be_distinguished_are_refused_at_upload(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification")
    set_config(**changes)(folder)
    (problem,) = inspected(folder).violations
    assert problem.reason == "MODEL_INVALID" and message in problem.message


def test_pictures_may_have_two_classes_of_one_name_as_imagenet_has(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=24, patch_size=8, num_labels=3, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    names = {"0": "crane", "1": "maillot", "2": "crane"}
    set_config(id2label=names, label2id={"crane": 2, "maillot": 1})(tmp_path / "m")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(processor))
    result = inspected(tmp_path / "m")
    assert not result.violations and list(result.model.labels) == ["crane", "maillot", "crane (2)"]
    write_folders(tmp_path / "garden", 3)
    task = {"fine_tuning": {"image_classification": {"new_head": True}}, "optimization": {"epochs": 1}}
    sources = {"model": {"uri": str(tmp_path / "m")}, "train_data": {"uri": str(tmp_path / "garden")}}
    tuned = planned(tmp_path, parse({**task, **sources}))
    assert not tuned.violations and list(tuned.plan.labels) == ["daisy", "rose", "violet"]


def test_labels_may_be_named_by_whole_numbers(tmp_path: Path) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification")
    set_config(id2label={"0": 7, "1": 9}, label2id={"7": 0, "9": 1})(folder)
    assert list(inspected(folder).model.labels) == ["7", "9"]
    assert asked(folder, "a dog").response.predictions[0].classification.label in ("7", "9")


NOT_LABELS: list[tuple[dict[str, Any], str]] = [
    ({"num_labels": -5}, "num_labels: -5"),
    ({"num_labels": 0}, "num_labels: 0"),
    ({"num_labels": "3"}, "num_labels: '3'"),
    ({"num_labels": 2.5}, "num_labels: '2.5'"),
    ({"num_labels": True}, "num_labels: 'True'"),
    ({"num_labels": [2]}, "num_labels: '[2]'"),
    ({"id2label": ["bad", "good"]}, "id2label"),
    ({"id2label": {"0": "bad", "1": None}}, "id2label"),
    ({"problem_type": "multi_class"}, "problem_type: 'multi_class'"),
    ({"problem_type": ["regression"]}, "problem_type"),
]


@pytest.mark.parametrize(("changes", "named"), NOT_LABELS, ids=[str(row[0]) for row in NOT_LABELS])
def test_what_is_not_a_number_or_kind_of_labels_is_refused_by_its_name_at_upload_and_at_plan(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification")
    set_config(**changes)(folder)
    said = [each.message for each in inspected(folder).violations]
    spec = spec_for("text_classification", tmp_path, folder)
    for message in (*said, *(each.message for each in planned(tmp_path, spec).violations)):
        assert f"config.json has {named}" in message or f"config.json has an {named}" in message
    assert len(said) == 1 and planned(tmp_path, spec).violations


@pytest.mark.parametrize("empty", [{"num_labels": None}, {"id2label": None}, {"id2label": {}}, {"problem_type": None}])
def test_settings_of_labels_that_say_nothing_are_as_if_they_were_not_there(
    tmp_path: Path, empty: dict[str, Any]
) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForSequenceClassification")
    set_config(**empty)(folder)
    result = inspected(folder)
    assert not result.violations and list(result.model.labels) == ["LABEL_0", "LABEL_1"]
    assert (result.model.inputs, result.model.parameters) == (["text", "pair"], "classification")
