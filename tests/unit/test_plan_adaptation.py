"""What a plan says of LoRA and of frozen layers: numbers, memory, and wishes that the model cannot fulfil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.plan_requests import ask, filled, fine_tuning, planned

CLASSES: dict[str, Any] = {"text_classification": {"pooling": "POOLING_CLS"}}
HEAD = 2 * 16 + 2
POOLER = 16 * 16 + 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return filled(tmp_path)


def adapted(root: Path, **adaptation: Any) -> Any:
    return ask(root, fine_tuning(fine_tuning={**CLASSES, **adaptation}))


def test_the_defaults_of_lora_are_filled_in_and_planned_again_the_same(root: Path) -> None:
    first = adapted(root, lora={})
    assert not first.violations
    spec = first.plan.resolved_spec
    assert (spec.fine_tuning.lora.rank, spec.fine_tuning.lora.alpha, spec.fine_tuning.lora.dropout) == (8, 16, 0)
    assert spec.optimization.learning_rate == 2e-4
    assert planned(root, spec) == first


def test_gradients_and_optimizer_states_are_those_of_what_is_trained(root: Path) -> None:
    whole, lora = ask(root, fine_tuning(fine_tuning=CLASSES)).plan, adapted(root, lora={"rank": 2}).plan
    assert whole.num_trainable_parameters == whole.num_parameters
    # Two layers: four of 16 by 16, and two between 16 and 32.
    adapters = 2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32))
    assert lora.num_parameters == whole.num_parameters + adapters
    assert lora.num_trainable_parameters == adapters + POOLER + HEAD
    assert lora.memory.parameters_bytes == 4 * lora.num_parameters
    assert lora.memory.gradients_bytes == 4 * lora.num_trainable_parameters
    assert lora.memory.optimizer_bytes == 8 * lora.num_trainable_parameters
    assert lora.checkpoint_bytes == 4 * lora.num_parameters + 8 * lora.num_trainable_parameters


@pytest.mark.parametrize(("layers", "least", "most"), [(0, 1.0, 1.0), (1, 0.45, 0.5), (2, 0.0, 0.05)])
def test_nothing_is_kept_of_frozen_layers_at_the_bottom(root: Path, layers: int, least: float, most: float) -> None:
    # Nor of the embeddings below them; the pooler above them keeps its input.
    whole = ask(root, fine_tuning(fine_tuning=CLASSES)).plan.memory.activations_bytes
    found = adapted(root, freeze={"layers": layers}).plan.memory.activations_bytes
    assert least * whole <= found <= most * whole


@pytest.mark.parametrize(
    ("adaptation", "field", "said"),
    [
        ({"lora": {"targets": ["query", "querry"]}}, "lora.targets[1]", "'querry'; did you mean query?"),
        ({"freeze": {"layers": 3}}, "freeze.layers", "3 layers are to be frozen, but the model has 2; use at most 2"),
        (
            {"lora": {}, "freeze": {"backbone": True}},
            "lora.targets",
            "all layers that would get adapters are frozen; freeze fewer",
        ),
    ],
)
def test_wishes_that_the_model_cannot_fulfil_are_refused(
    root: Path, adaptation: dict[str, Any], field: str, said: str
) -> None:
    (violation,) = adapted(root, **adaptation).violations
    assert (violation.field, violation.reason) == (f"spec.fine_tuning.{field}", "SPEC_INVALID")
    assert said in violation.message


@pytest.mark.parametrize("adaptation", [{"lora": {}}, {"freeze": {"layers": 1}}])
def test_what_is_frozen_of_a_new_model_is_warned_of(root: Path, adaptation: dict[str, Any]) -> None:
    spec = fine_tuning(
        fine_tuning={**CLASSES, **adaptation},
        model={"architecture": {"model_type": "bert", "overrides": {"num_hidden_layers": 1, "hidden_size": 24}}},
        tokenizer={"uri": "ROOT/bert"},
    )
    assert "FROZEN_AT_RANDOM" in [warning.reason for warning in ask(root, spec).plan.warnings]
    assert "FROZEN_AT_RANDOM" not in [warning.reason for warning in adapted(root, **adaptation).plan.warnings]
