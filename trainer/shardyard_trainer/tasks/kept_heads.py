"""Decides whether fine-tuning keeps the classification head of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardyard_trainer.data.errors import SpecError, listed
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelSchema
from shardyard_trainer.models import architectures
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import TrainingTask, has_head

PROBLEMS: Mapping[int, str] = {SINGLE_LABEL: "single_label", MULTI_LABEL: "multi_label", REGRESSION: "regression"}
"""The name of each problem in shardyard.json, by its value in a spec."""


def head_order(choice: ModelChoice, labels: Sequence[str], task: TrainingTask) -> tuple[str, ...]:
    """The labels in the order of the head's outputs if the head has exactly these, else empty."""
    own = choice.described.labels if choice.described is not None and has_head(choice, task) else ()
    return own if set(own) == set(labels) and tuple(labels) != own else ()


def keeps_head(
    choice: ModelChoice, schema: LabelSchema, pooling: str, field: str, *, task: TrainingTask, new_head: bool
) -> bool:
    """Whether training keeps the head of the choice's folder.

    Raises SpecError LABEL_MISMATCH for a head with other labels; `field` is the place of the task's message.
    """
    described = choice.described
    if described is None or new_head or not has_head(choice, task):
        return False
    own, ours = described.labels, schema.labels
    generic = all(name.startswith("LABEL_") for name in own) and len(own) == schema.num_outputs
    if described.problem != PROBLEMS[schema.problem] or not (own == ours or generic or not ours):
        raise SpecError(
            f"{field}.new_head",
            "LABEL_MISMATCH",
            f"the model's head is {described.problem} with {len(own)} labels ({listed(own, most=8)}), the data "
            f"{PROBLEMS[schema.problem]} with {len(ours)} ({listed(ours, most=8)}); {_next_step(own, ours)}",
        )
    # A head trained on another vector of the text is useless.
    return architectures.default_pooling(choice.config, choice.described) == pooling and _is_loadable(choice, pooling)


def _next_step(own: Sequence[str], ours: Sequence[str]) -> str:
    if set(ours) == set(own):
        return "leave labels out to keep the head in its own order, or set new_head for a new one"
    if set(ours) < set(own):
        return f"set labels to {list(own)!r} to keep it, or set new_head for a new one"
    if {label.casefold() for label in ours} <= {label.casefold() for label in own}:
        return "write the data's labels as the head has them to keep it, or set new_head for a new one"
    return "set new_head for a new one"


def _is_loadable(choice: ModelChoice, pooling: str) -> bool:
    # Neither transformers' own head for this vector nor ours: a head of a class that is not used here.
    is_native = architectures.native_pooling(choice.config, choice.described) == pooling
    return is_native or (choice.folder is not None and choice.folder.has("head.safetensors"))
