"""Weights of classes: how the training loss counts them, and what it is divided by; tags at every token of a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from helpers.small_specs import architecture, locations, parse
from helpers.tagged import planned, spec_of, write_lines
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.tasks.base import Prepared, build_module
from shardyard_trainer.tasks.ingredients import prepare

GIVEN = {"O": 0.25, "B-PER": 3.0}
LONG = "thequickbrownfoxjumpsoverthelazydog"
"""All letters: a vocabulary of 64 has no room for longer pieces of words."""


def tagged(folder: Path) -> Path:
    rows = [{"tokens": ["Anna", "met", "Bob", "Smithsonian"], "tags": ["B-PER", "O", "B-PER", "I-PER"]}] * 7
    return write_lines(folder / "tags.jsonl", [*rows, {"tokens": [LONG, "is"], "tags": ["B-LOC", "O"]}])


def classes(folder: Path, task: dict[str, Any]) -> Any:
    rows = [{"text": f"a {at}", "label": "rare" if at % 5 == 0 else "often"} for at in range(20)]
    return parse(
        {
            "fineTuning": {"textClassification": {"maxLength": 16, **task}},
            "model": architecture("bert"),
            "tokenizer": {"train": {"algorithm": "ALGORITHM_WORDPIECE", "vocabSize": 80}},
            "trainData": {"uri": str(write_lines(folder / "classes.jsonl", rows))},
            "evaluation": {"holdout": 0},
            "optimization": {"maxSteps": 4, "globalBatchSize": 4},
        }
    )


def batch_of(prepared: Prepared) -> MicroBatch:
    return prepared.train.micro_batch([SampleRef(0, at) for at in range(prepared.train.num_samples)])


def losses(prepared: Prepared, spec: Any, weights: torch.Tensor | None) -> tuple[float, float, float]:
    """Of one batch: the module's loss, torch's own sum with these weights, and the module's loss while evaluating."""
    module, batch = build_module(prepared, spec).eval(), batch_of(prepared)
    with torch.no_grad():
        found = module(**batch.inputs, return_outputs=True)
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
        logits = found.outputs["logits"] if "logits" in found.outputs else module.model(**inputs).logits
    labels = batch.inputs["labels"].flatten()
    expected = F.cross_entropy(logits.flatten(0, -2), labels, weight=weights, ignore_index=-100, reduction="sum")
    # Training, but without dropout.
    module.training = True
    return module(**batch.inputs).loss_sum.item(), float(expected), float(found.loss_sum)


def test_tags_weigh_as_the_spec_says_and_the_loss_is_divided_by_the_sum(tmp_path: Path) -> None:
    spec = spec_of(tagged(tmp_path), {"classWeights": {"weights": GIVEN}}, evaluation={"holdout": 0})
    found = planned(tmp_path, spec)
    assert not found.violations, found.violations
    resolved = found.plan.resolved_spec
    assert dict(resolved.fine_tuning.token_classification.class_weights.weights) == GIVEN
    assert planned(tmp_path, resolved).plan == found.plan
    prepared = prepare(resolved, locations(tmp_path))
    weights = torch.tensor([GIVEN.get(label, 1.0) for label in prepared.labels])
    ours, expected, plain = losses(prepared, resolved, weights)
    assert ours == pytest.approx(expected, rel=1e-6) and plain != pytest.approx(ours, rel=1e-2)
    # 14 of 30 words begin a person, 7 are inside one, one begins a place, 8 are outside.
    assert batch_of(prepared).num_units == 14 * 3.0 + 7 + 1 + 8 * 0.25


def test_balanced_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    spec = spec_of(tagged(tmp_path), {"classWeights": {"balanced": True}}, evaluation={"holdout": 0})
    prepared = prepare(spec, locations(tmp_path))
    labels = batch_of(prepared).inputs["labels"]
    found = labels[labels >= 0].numpy()
    expected = compute_class_weight("balanced", classes=np.unique(found), y=found)
    assert prepared.train.weights[np.unique(found)] == pytest.approx(expected, rel=1e-6)
    # No word is inside a place: nothing is divided by.
    assert prepared.train.weights[prepared.labels.index("I-LOC")] == 1
    # What a balanced loss is divided by is the number of words again.
    assert batch_of(prepared).num_units == pytest.approx(len(found), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_of_texts_weigh_in_the_same_way(tmp_path: Path, smoothing: float) -> None:
    spec = classes(tmp_path, {"classWeights": {"balanced": True, "weights": {"often": 2}}, "labelSmoothing": smoothing})
    assert not planned(tmp_path, spec).violations
    prepared = prepare(spec, locations(tmp_path))
    assert list(prepared.schema.labels) == ["often", "rare"]
    assert list(prepared.train.weights) == [2.0, 20 / (2 * 4)]
    assert batch_of(prepared).num_units == 16 * 2 + 4 * 2.5
    if not smoothing:
        ours, expected, plain = losses(prepared, spec, torch.tensor([2.0, 2.5]))
        assert ours == pytest.approx(expected, rel=1e-6) and plain < ours


def test_what_cannot_be_weighed_is_refused_by_its_field(tmp_path: Path) -> None:
    tags = tagged(tmp_path)
    place = "spec.fine_tuning.token_classification.class_weights"
    for spec, field, message in (
        (spec_of(tags, {"classWeights": {"weights": {"B-PRE": 2}}}), f"{place}.weights", "did you mean B-PER?"),
        (
            classes(tmp_path, {"classWeights": {"balanced": True}, "problem": "PROBLEM_MULTI_LABEL"}),
            "spec.fine_tuning.text_classification.class_weights",
            "for single labels only",
        ),
    ):
        found = {each.field: each.message for each in planned(tmp_path, spec).violations}
        assert message in found[field], json.dumps(found)


def test_the_later_tokens_of_a_word_are_learnt_inside_of_its_entity_and_never_evaluated(tmp_path: Path) -> None:
    tokens: dict[bool, list[str]] = {}
    for every in (False, True):
        task = {"labelAllPieces": every, "maxLength": 64}
        small = {"train": {"algorithm": "ALGORITHM_WORDPIECE", "vocabSize": 64}}
        spec = spec_of(tagged(tmp_path), task, evalData={"uri": str(tagged(tmp_path))}, tokenizer=small)
        prepared = prepare(spec, locations(tmp_path))
        last = prepared.train.micro_batch([SampleRef(0, 7)]).inputs
        tokens[every] = [prepared.labels[at] if at >= 0 else "" for at in last["labels"][0].tolist()]
        assert prepared.eval.micro_batch([SampleRef(0, 7)]).inputs["labels"].ge(0).sum() == 2
    firsts, all_of_them = tokens[False], tokens[True]
    assert [tag for tag in firsts if tag] == ["B-LOC", "O"]
    assert not all_of_them[0] and not all_of_them[-1], "what frames a text is no word"
    later, others = (len(prepared.inputs.tokenizer.tokenize(word)) - 1 for word in (LONG, "is"))
    assert later > 20 and all_of_them[1:-1] == ["B-LOC", *["I-LOC"] * later, "O", *["O"] * others]
