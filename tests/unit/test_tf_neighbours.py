"""What lies in and beside a TensorFlow checkpoint: what training leaves, other names, other formats, other files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from helpers.bundles import Part, floats
from helpers.plan_requests import ask
from helpers.tf_checkpoints import bert, found, planned_with, room
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.vocabularies import build_tokenizer
from shardyard_trainer.models import conversion
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.models.folder import read_folder

SKIPPED: list[tuple[str, Mapping[str, Part], str]] = [
    ("loss scale", {"loss_scale": floats(), "current_loss_scale": floats()}, "2 counters"),
    ("rates", {"learning_rate": floats(), "beta1_power": floats()}, "2 counters"),
    ("metrics", {"keras_api/metrics/0/total": floats(), "train_loss/count": floats()}, "2 metrics"),
    (
        "factored slots",
        {f"bert/embeddings/word_embeddings/adafactor_{name}": floats(size) for name, size in (("vr", 9), ("vc", 4))},
        "2 slots of the optimizer",
    ),
    (
        "averages",
        {"bert/pooler/dense/bias/ExponentialMovingAverage": floats(4)},
        r"1 averaged weights \(EMA\): those that were not averaged are used",
    ),
    (
        "averages of Keras",
        {"bert/pooler/dense/bias/.OPTIMIZER_SLOT/optimizer/average/.ATTRIBUTES/VARIABLE_VALUE": floats(4)},
        r"1 averaged weights \(EMA\)",
    ),
]


@pytest.mark.parametrize(("what", "more", "said"), SKIPPED, ids=[row[0] for row in SKIPPED])
def test_what_training_leaves_behind_is_skipped_and_counted(
    what: str, more: Mapping[str, Part], said: str, tmp_path: Path
) -> None:
    bert(tmp_path / "bert", more)
    assert re.search(f"39 tensors; skipped {said}", found(tmp_path / "bert", tmp_path).note)


def test_a_number_of_the_model_is_not_skipped(tmp_path: Path) -> None:
    bert(tmp_path / "bert", {"bert/encoder/temperature": floats()})
    with pytest.raises(SpecError, match="no place for: bert/encoder/temperature"):
        found(tmp_path / "bert", tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [("bert/", "module/bert/"), ("bert/", "bert_1/"), ("LayerNorm", "layer_normalization")]
)
def test_a_bert_under_other_names_is_converted(old: str, new: str, tmp_path: Path) -> None:
    bert(tmp_path / "bert", {}, (old, new))
    assert conversion.note_of(found(tmp_path / "bert", tmp_path).folder).endswith("(TensorFlow 1): 39 tensors")


def test_an_albert_is_called_so(tmp_path: Path) -> None:
    inner = "bert/encoder/transformer/group_0/inner_group_0/attention_1/self/query/kernel"
    bert(tmp_path / "bert", {inner: floats(4, 4)})
    with pytest.raises(SpecError, match=r"this is an ALBERT .*give a Hugging Face folder"):
        found(tmp_path / "bert", tmp_path)


def without_index(folder: Path) -> None:
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        (folder / name).unlink()


def moved(folder: Path) -> None:
    (folder / "uncased_L-2").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "uncased_L-2" / path.name)


ELSEWHERE: list[tuple[str, Callable[[Path], object], str]] = [
    ("one folder below", moved, "its folder 'uncased_L-2' has model.ckpt: give the path of that"),
    ("SavedModel", lambda f: (without_index(f), (f / "saved_model.pb").touch()), "it is a SavedModel"),
    ("Keras", lambda f: (without_index(f), (f / "tf_model.h5").touch()), "tf_model.h5 is a file of Keras"),
    ("V1", lambda f: (without_index(f), (f / "old.ckpt").touch()), "it has old.ckpt: if it is one of the first format"),
    ("nothing", without_index, "give a Hugging Face folder as `uri`"),
    (
        "settings under another name",
        lambda f: (f / "bert_config.json").rename(f / "bert_config_base.json"),
        "(bert_config_base.json beside it is not read: call it bert_config.json)",
    ),
]


@pytest.mark.parametrize(("what", "change", "said"), ELSEWHERE, ids=[row[0] for row in ELSEWHERE])
def test_a_folder_without_a_checkpoint_is_told_what_it_has(
    what: str, change: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    root = room(tmp_path)
    bert(root / "model", {})
    change(root / "model")
    result = ask(root, planned_with("ROOT/model"))
    assert result.violations and said in result.violations[0].message, result.violations


def test_a_checkpoint_that_is_given_as_a_folder_is_called_what_it_is(tmp_path: Path) -> None:
    bert(tmp_path / "bert", {})
    with pytest.raises(FolderInvalid, match=r"model\.ckpt is a TensorFlow checkpoint: .* as `checkpoint`"):
        read_folder(open_folder(tmp_path / "bert"))


@pytest.mark.parametrize(("name", "said"), [("vocab-nq.txt", "call vocab-nq.txt so"), ("README.md", "put the one of")])
def test_a_checkpoint_without_a_vocabulary_says_what_it_needs(name: str, said: str, tmp_path: Path) -> None:
    bert(tmp_path / "bert", {})
    (tmp_path / "bert" / name).write_text("[PAD]\n")
    with pytest.raises(FolderInvalid, match=rf"has no vocab\.txt beside it: {said}.*, or give a `tokenizer`"):
        build_tokenizer(found(tmp_path / "bert", tmp_path).folder)


def test_a_checkpoint_may_be_called_as_a_browser_calls_it(tmp_path: Path) -> None:
    bert(tmp_path / "my bert", {})
    for path in (tmp_path / "my bert").glob("model.*"):
        path.rename(path.with_name(path.name.replace("ckpt", "ckpt(1)")))
    assert found(tmp_path / "my bert/model.ckpt(1)", tmp_path).note
