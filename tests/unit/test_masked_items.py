"""Masked items: masks that depend on seed, pass and sample alone, targets at a mask, and models that do not fit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format

from helpers.plan_requests import ask, places, where
from shardyard.v1 import spec_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import Prepared
from shardyard_trainer.tasks.ingredients import prepare

TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
MASK, LONGEST = 13, 5


def masked(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "pretraining": {"masked_item": {"max_history": LONGEST, "mask_probability": 0.4}},
        "model": {"architecture": {"model_type": "bert", "overrides": TINY}},
        "train_data": {"uri": "ROOT/a.csv"},
        "optimization": {"max_steps": 3, "seed": 5},
    }
    return {**spec, **changes}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    draw = random.Random(2)
    first = [f"u0,i{item}" for item in range(12)]
    rows = [f"u{user},i{draw.randrange(12)}" for user in range(1, 40) for _ in range(draw.randint(2, 9))]
    (folder / "a.csv").write_text("\n".join(["user,item", *first, *rows]) + "\n")
    (folder / "none.csv").write_text("user,item\nu,i1\nv,i2\n")
    return folder


@pytest.fixture(scope="module")
def prepared(root: Path) -> Prepared:
    spec = spec_pb2.JobSpec()
    json_format.ParseDict(masked(train_data={"uri": str(root / "a.csv")}), spec)
    return prepare(spec, where(root))


def rows_of(prepared: Prepared, epoch: int, samples: list[int]) -> list[tuple[list[int], list[int]]]:
    """What the model reads of each sample, without padding, and the items under its masks."""
    inputs = prepared.train.micro_batch([SampleRef(epoch, sample) for sample in samples]).inputs
    width, targets = inputs["input_ids"].shape[1], inputs["targets"].tolist()
    owners = (inputs["masked_places"] // width).tolist()
    assert (inputs["input_ids"].flatten()[inputs["masked_places"]] == MASK).all()
    return [
        (ids[real.bool()].tolist(), [target for target, owner in zip(targets, owners, strict=True) if owner == row])
        for row, (ids, real) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
    ]


def test_masks_depend_on_the_pass_and_the_sample_alone(prepared: Prepared) -> None:
    every = list(range(prepared.train.num_samples))
    together = rows_of(prepared, 0, every)
    assert together == [rows_of(prepared, 0, [sample])[0] for sample in every]
    assert together == list(reversed(rows_of(prepared, 0, every[::-1])))
    assert together != rows_of(prepared, 1, every)


def test_a_history_is_whole_again_if_its_masks_are_filled(prepared: Prepared) -> None:
    seen = set()
    for epoch in range(60):
        for ids, targets in rows_of(prepared, epoch, list(range(prepared.train.num_samples))):
            filled = iter(targets)
            whole = [next(filled) if token == MASK else token for token in ids]
            assert targets and next(filled, None) is None and 2 <= len(whole) <= LONGEST + 1
            assert all(1 <= token < MASK for token in whole)
            seen.add(tuple(whole))
    assert len(seen) <= prepared.train.num_samples


def test_about_as_many_items_are_masked_as_asked_and_sometimes_the_last_alone(prepared: Prepared) -> None:
    found = [row for epoch in range(100) for row in rows_of(prepared, epoch, [0])]
    shares = [len(targets) / len(ids) for ids, targets in found]
    # A tenth has one mask of six; of the others 0.4, and a single one if chance has drawn none.
    assert 0.3 < float(np.mean(shares)) < 0.48
    last_alone = sum(ids[-1] == MASK and len(targets) == 1 for ids, targets in found)
    assert 4 < last_alone < 40


def test_what_is_evaluated_is_the_last_item_behind_all_that_its_user_had(prepared: Prepared) -> None:
    assert prepared.eval is not None
    inputs = prepared.eval.micro_batch([SampleRef(0, sample) for sample in range(prepared.eval.num_samples)]).inputs
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.tolist() == prepared.eval.lengths().tolist()  # type: ignore[union-attr]
    assert int(lengths.max()) == LONGEST + 1 == prepared.choice.config.max_position_embeddings
    at = torch.arange(len(lengths)) * inputs["input_ids"].shape[1] + lengths - 1
    assert torch.equal(at, inputs["masked_places"])
    # The first user has had i0 to i11 in this order: tokens 1 to 12.
    assert inputs["input_ids"][0].tolist() == [7, 8, 9, 10, 11, MASK] and inputs["targets"][0] == 12
    assert sorted({*inputs["seen"][0].tolist()}) == list(range(1, 12))


REFUSED = [
    ("a model that reads left to right", masked(model={"architecture": {"model_type": "gpt2"}}),
     ("pretraining.masked_item", "OBJECTIVE_UNSUPPORTED"), "use one such as bert or distilbert"),
    ("recommendation by a model of both directions",
     masked(pretraining={}, fine_tuning={"recommendation": {}}) | {"pretraining": None},
     ("fine_tuning.recommendation", "OBJECTIVE_UNSUPPORTED"), "use one such as gpt2 or llama"),
    ("another vocabulary",
     masked(model={"architecture": {"model_type": "bert", "overrides": {**TINY, "vocab_size": 13}}}),
     ("model.architecture.overrides.vocab_size", "SPEC_INVALID"), "the padding and the mask are two more"),
    ("too few positions for the mask",
     masked(model={"architecture": {"model_type": "bert", "overrides": {**TINY, "max_position_embeddings": LONGEST}}}),
     ("pretraining.masked_item.max_history", "SPEC_INVALID"), "6 is more than the 5"),
    ("users with one item", masked(train_data={"uri": "ROOT/none.csv"}), ("train_data", "DATA_INVALID"),
     "none of 2 users has two interactions"),
    ("a tokenizer", masked(tokenizer={"train": {}}), ("tokenizer", "SPEC_INVALID"), "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_does_not_fit_is_refused(root: Path, spec: dict[str, Any], expected: tuple[str, str], words: str) -> None:
    result = ask(root, {name: value for name, value in spec.items() if value is not None})
    assert places(result) == [(f"spec.{expected[0]}", expected[1])]
    assert words in result.violations[0].message


def test_a_plan_fills_in_what_was_left_out(root: Path) -> None:
    result = ask(root, masked(pretraining={"masked_item": {}}))
    assert not result.violations
    task = result.plan.resolved_spec.pretraining.masked_item
    assert (task.mask_probability, task.max_history, task.exclude_seen) == (0.2, 50, True)
    assert task.split == spec_pb2.Recommendation.SPLIT_LEAVE_ONE_OUT
