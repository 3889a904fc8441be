"""Every text architecture of the installed transformers goes through everything, or is refused by name."""

from __future__ import annotations

import pytest

from helpers.architecture_sweep import sweep
from helpers.tiny_architectures import text_architectures
from shardyard_trainer.models import architectures

pytestmark = pytest.mark.prove

UNEXPLAINED = {"ibert"}  # Its vectors of tokens are quantised.


@pytest.mark.parametrize("model_type", text_architectures())
def test_an_architecture_works_or_is_refused_by_name(model_type: str) -> None:
    found = sweep(model_type)
    assert not found.faults, found.faults
    unforeseen = {task: why for task, why in found.refused.items() if not is_foreseen(model_type, why)}
    assert not unforeseen, unforeseen
    assert not found.explained or model_type in UNEXPLAINED, found.explained
    assert found.trained or model_type in architectures.NOT_TRAINED or is_of_no_text(found.refused), found.refused


def is_foreseen(model_type: str, why: str) -> bool:
    """Whether a refusal names the task or the architecture, not a setting of the tiny model."""
    return "OBJECTIVE_UNSUPPORTED" in why or is_of_no_text({"": why}) or f"{model_type} has no default" in why


def is_of_no_text(refused: dict[str, str]) -> bool:
    """Whether it is not a model that reads a text by itself."""
    parts = (
        "does not give one vector for each token",
        "transformers has no model type",
        "has no default configuration",
    )
    return any(part in why for why in refused.values() for part in parts)
