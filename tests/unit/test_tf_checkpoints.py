"""TensorFlow checkpoints are models: found, converted once, equal to what TensorFlow computes, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.bundles import Part, Written, floats
from helpers.plan_requests import ask, places
from helpers.small_specs import locations, shared_data
from helpers.tf_checkpoints import GARDEN, bert, found, planned_with, room, set_params
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.models import conversion
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.models.weights import load_pretrained
from shardyard_trainer.planning.pins import check_same_model, model_fingerprint


def computed(folder: Path, given: Mapping[str, np.ndarray]) -> Any:
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    tensors = {
        "input_ids": torch.tensor(given["input_word_ids"]).long(),
        "attention_mask": torch.tensor(given["input_mask"]).long(),
        "token_type_ids": torch.tensor(given["input_type_ids"]).long(),
    }
    with torch.no_grad():
        return model(**tensors, output_hidden_states=True)


def near(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Within 1e-5 of the largest value, or of 1."""
    return float(np.abs(ours.numpy() - theirs).max()) < 1e-5 * max(1.0, float(np.abs(theirs).max()))


@pytest.mark.parametrize("name", ["bert_v1", "bert_v2", "bert_v2_pretrained", "bert_v1_classifier"])
def test_a_bert_of_model_garden_computes_what_tensorflow_computes(name: str, tmp_path: Path) -> None:
    folder = found(GARDEN / name, tmp_path).folder.path
    expected = np.load(GARDEN / name / "expected.npz")
    outputs = computed(folder, expected)
    if "sequence" in expected:
        real = expected["input_mask"].astype(bool)
        assert near(outputs.hidden_states[-1][torch.tensor(real)], expected["sequence"][real])
    if "pooled" in expected:
        assert near(outputs.pooler_output, expected["pooled"])
    if "masked" in expected:
        positions = expected["masked_lm_positions"]
        at_masks = torch.stack([row[places] for row, places in zip(outputs.prediction_logits, positions, strict=True)])
        assert near(at_masks, expected["masked"]) and near(outputs.seq_relationship_logits, expected["next"])
    if "logits" in expected:
        assert near(outputs.logits, expected["logits"]) and outputs.logits.shape[1] == 3


@pytest.mark.parametrize("name", ["resnet_10", "resnet_50"])
def test_a_resnet_of_model_garden_computes_what_tensorflow_computes(name: str, tmp_path: Path) -> None:
    folder, note = found(GARDEN / name, tmp_path)[0], found(GARDEN / name, tmp_path).note
    expected = np.load(GARDEN / name / "expected.npz")
    pixels = torch.tensor(expected["pictures"]).permute(0, 3, 1, 2)
    config = model_config(folder)
    kind = "AutoModelForImageClassification" if "logits" in expected else "AutoModel"
    model, info = load_pretrained(getattr(transformers, kind), folder, config)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        outputs = model.eval()(pixels)
    if "logits" in expected:
        assert near(outputs.logits, expected["logits"]) and "norm_epsilon is taken to be 0.001" in note
    else:
        assert near(outputs.last_hidden_state.permute(0, 2, 3, 1), expected["hidden"]) and config.norm_epsilon == 1e-5
        settings = json.loads((folder.path / "preprocessor_config.json").read_text())
        assert settings["size"] == {"shortest_edge": 73} and settings["crop_size"] == {"height": 64, "width": 64}


def test_a_transformer_of_model_garden_computes_what_tensorflow_computes(tmp_path: Path) -> None:
    folder = found(GARDEN / "transformer", tmp_path).folder
    expected = np.load(GARDEN / "transformer/expected.npz")
    model, info = load_pretrained(transformers.AutoModelForSeq2SeqLM, folder, model_config(folder))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    sources_BT, targets_BT = (torch.tensor(expected[name]).long() for name in ("inputs", "targets"))
    read_BT = torch.cat([torch.zeros_like(targets_BT[:, :1]), targets_BT[:, :-1]], 1)
    with torch.no_grad():
        outputs = model.eval()(input_ids=sources_BT, attention_mask=(sources_BT != 0).long(), decoder_input_ids=read_BT)
    assert near(outputs.logits, expected["logits"])


def test_a_bert_of_tensorflow_1_is_planned_with_what_was_skipped(tmp_path: Path) -> None:
    root = room(tmp_path)
    shutil.copytree(shared_data("tf1_bert_tiny"), root / "tf1")
    for uri in ("ROOT/tf1", "ROOT/tf1/bert_model.ckpt", "ROOT/tf1/bert_model.ckpt.index"):
        result = ask(root, planned_with(uri))
        assert not result.violations, result.violations
        assert result.plan.resolved_spec.model.checkpoint.uri == f"{root}/tf1/bert_model.ckpt.index"
        (note,) = [each for each in result.plan.warnings if each.reason == "MODEL_CONVERTED"]
        assert "the original BERT (TensorFlow 1)" in note.message
        assert "skipped 1 counters, 92 slots of the optimizer" in note.message


def test_the_settings_of_model_garden_are_read(tmp_path: Path) -> None:
    shutil.copytree(GARDEN / "bert_v2", tmp_path / "bert")
    set_params(hidden_activation="relu", dropout_rate=0.25)(tmp_path / "bert")
    config = json.loads((found(tmp_path / "bert", tmp_path).folder.path / "config.json").read_text())
    assert (config["hidden_act"], config["hidden_dropout_prob"]) == ("relu", 0.25)


def test_a_checkpoint_is_converted_once_and_again_when_its_bytes_change(tmp_path: Path) -> None:
    shutil.copytree(GARDEN / "bert_v2", tmp_path / "bert")
    first = found(tmp_path / "bert", tmp_path).folder.path
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert found(tmp_path / "bert/bert_model.ckpt", tmp_path).folder.path == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    (tmp_path / "bert/vocab.txt").write_text("other\n" * 19)
    assert found(tmp_path / "bert", tmp_path).folder.path != first


def test_the_latest_of_several_checkpoints_is_pinned(tmp_path: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(GARDEN / "bert_v1", several)
    for name in ("ckpt-1.index", "ckpt-1.data-00000-of-00001"):
        shutil.copy(several / name, several / name.replace("-1.", "-10.", 1))
        (several / name).rename(several / name.replace("-1.", "-9.", 1))
    with pytest.raises(SpecError, match=r"2 checkpoints: ckpt-9, ckpt-10; name one of them .* ckpt-10\.index"):
        found(several, tmp_path)
    for path in ("/there/ckpt-9", "C:\\\\Users\\\\me\\\\ckpt-9"):
        state = f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "ckpt-10"\n'
        (several / "checkpoint").write_text(state)
        assert found(several, tmp_path).pinned == spec_pb2.TensorflowCheckpoint(uri=str(several / "ckpt-9.index"))
    (several / "checkpoint").write_text('model_checkpoint_path: "../secret/ckpt-8"\n')
    with pytest.raises(SpecError, match="2 checkpoints"):
        found(several, tmp_path)


def accepted(root: Path) -> tuple[spec_pb2.JobSpec, worker_pb2.Locations, plan_pb2.JobPlan]:
    spec = spec_pb2.JobSpec()
    spec.model.checkpoint.uri = str(root / "bert")
    where = locations(root)
    return spec, where, plan_pb2.JobPlan(model_fingerprint=model_fingerprint(spec, where))


def test_a_checkpoint_that_changed_since_the_submission_is_not_trained(tmp_path: Path) -> None:
    shutil.copytree(GARDEN / "bert_v2", tmp_path / "bert")
    spec, where, plan = accepted(tmp_path)
    (tmp_path / "bert/README.md").write_text("unread")
    check_same_model(spec, where, plan)
    config = tmp_path / "bert/bert_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    with pytest.raises(RunFailed, match="not those that were inspected") as failed:
        check_same_model(spec, where, plan)
    assert failed.value.cause == "MODEL_CHANGED"
    shutil.rmtree(tmp_path / "bert")
    with pytest.raises(RunFailed) as failed:
        check_same_model(spec, where, plan)
    assert failed.value.cause == "MODEL_NOT_FOUND"


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "bert_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def linked(folder: Path) -> None:
    outside = folder.parents[1] / "outside"
    (folder / "vocab.txt").rename(outside)
    (folder / "vocab.txt").symlink_to(outside)


def broken(folder: Path, text: str) -> None:
    set_params()(folder)
    (folder / "params.yaml").write_text(text)


REFUSED: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("no settings", "tf1", lambda f: (f / "bert_config.json").unlink(), "put its bert_config.json"),
    ("heads that do not divide", "tf1", set_config(num_attention_heads=3), "does not divide"),
    ("heads in words", "tf1", set_config(num_attention_heads="4"), "not a whole number"),
    (
        "a count of another model",
        "garden",
        set_config(hidden_size=768),
        "is not 32, as the tensors have",
    ),
    ("an unknown activation", "garden", set_config(hidden_act="mish"), "'mish', which is not one of"),
    (
        "settings that are none",
        "garden",
        lambda f: (f / "bert_config.json").write_text("[]"),
        "object",
    ),
    ("no checkpoint", "garden", lambda f: (f / "bert_model.ckpt.index").unlink(), "ends in .index"),
    ("a link that leaves", "garden", linked, "vocab.txt"),
    (
        "params of another model",
        "garden",
        set_params(num_layers=12),
        "params.yaml has num_hidden_layers: '12', which is",
    ),
    ("norm first", "garden", set_params(norm_first=True), "normalises afterwards; it cannot be converted"),
    ("params that are none", "garden", lambda f: broken(f, "a: [" * 10_000), "params.yaml is not YAML of plain values"),
    ("params with code", "garden", lambda f: broken(f, "a: !!python/name:os.system x"), "not YAML of plain values"),
    ("dropout of a text", "garden", set_config(hidden_dropout_prob="x"), "hidden_dropout_prob"),
]


@pytest.mark.parametrize(("what", "kind", "change", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_converted_is_refused_at_submission(
    what: str, kind: str, change: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    root = room(tmp_path)
    shutil.copytree(GARDEN / "bert_v2" if kind == "garden" else shared_data("tf1_bert_tiny"), root / "model")
    for path in (root / "model", *(root / "model").iterdir()):
        path.chmod(0o755)
    change(root / "model")
    result = ask(root, planned_with("ROOT/model"))
    assert result.violations and said in result.violations[0].message, result.violations
    assert result.violations[0].reason == ("PATH_NOT_ALLOWED" if "link" in what else "MODEL_INVALID")
    assert result.violations[0].field.startswith("spec.model.checkpoint"), places(result)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    names = ["embeddings", "norm/gamma"]
    Written({f"odd/{name}": floats(3) for name in names}).save(tmp_path / "odd")
    with pytest.raises(SpecError, match=r"2 tensors \(odd/embeddings, odd/norm/gamma\): this is not a BERT"):
        found(tmp_path / "odd", tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"bert/encoder/layer_0/adapter/kernel": floats(4, 4)},
            "1 tensors that it has no place for: bert/encoder/layer_0",
        ),
        ({"bert/pooler/dense/bias": None}, "lacks 1 tensors of it: bert/pooler/dense/bias"),
        ({"bert/encoder/layer_1/output/dense/bias": floats(5)}, r"has the shape \[5\], where the others ask for \[4\]"),
        ({"bert/encoder/layer_0/attention/self/query/kernel": None}, "query/kernel' is missing"),
        ({"bert/embeddings/word_embeddings": floats(4)}, r"word_embeddings' has the shape \[4\]"),
        ({"bert/embeddings/LayerNorm/beta": Part(1, (4,), np.full(4, np.nan, "<f4").tobytes())}, "not finite"),
    ],
)
def test_a_bert_that_is_not_whole_or_has_more_is_refused(
    changes: Mapping[str, Part | None], said: str, tmp_path: Path
) -> None:
    bert(tmp_path / "bert", changes)
    with pytest.raises(SpecError, match=said) as refused:
        found(tmp_path / "bert", tmp_path)
    assert refused.value.metadata["tensor"] in str(refused.value)
    assert not list((tmp_path / "cache/converted").glob("[!.]*"))


def test_the_same_bert_without_changes_is_converted(tmp_path: Path) -> None:
    bert(tmp_path / "bert", {})
    note = conversion.note_of(found(tmp_path / "bert", tmp_path).folder)
    assert note == "converted from the original BERT (TensorFlow 1): 39 tensors"
