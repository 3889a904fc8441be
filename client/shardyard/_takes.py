"""The input fields and parameters of `Predict` for a model, even if it was registered before they were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from shardyard.v1 import model_service_pb2


class Takes(NamedTuple):
    """The members of `Instance.input`, the usual one first, and the member of `PredictRequest.parameters`."""

    inputs: tuple[str, ...]
    parameters: str


_BY_TASK: Mapping[str, Takes] = {
    "image_classification": Takes(("image",), "classification"),
    "recommendation": Takes(("items",), "recommendation"),
    "question_answering": Takes(("question", "pair"), "question_answering"),
    "instruction": Takes(("messages", "text"), "generation"),
}
"""Tasks of such models whose usual input is not a text."""


def takes_of(model: model_service_pb2.Model) -> Takes:
    """What the model says, else what its task takes."""
    usual = _BY_TASK.get(model.task, Takes((), ""))
    return Takes(tuple(model.inputs) or usual.inputs, model.parameters or usual.parameters)
