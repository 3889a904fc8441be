"""Code shared by the predictors of text tasks."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.base import violation
from shardyard_trainer.tasks.module import HuggingFaceModule

LONGEST = 1024
"""Texts are cut to this many tokens if neither training nor the architecture sets a limit."""

TOKEN_BYTES = 16
"""The assumed maximum of bytes of text for one token, to bound an answer's size in advance."""


class TextPredictor:
    """Answers requests about single texts with a language model; subclasses implement `read` and `answer`."""

    parameters = ""
    """The member of `PredictRequest.parameters` that the task takes."""

    takes: tuple[str, ...] = ("text",)
    """The members of `Instance.input` that it takes, the usual one first."""

    def __init__(self, task: str, loaded: Loaded, inputs: TextInputs) -> None:
        self.task = task
        self.loaded = loaded
        self.inputs = inputs

    @property
    def length_limit(self) -> int:
        """Texts are cut to this many tokens: as in training, else as many as the model can address."""
        limits = [limit for limit in (self.loaded.folder.max_length, self.loaded.longest) if limit is not None]
        return min(limits, default=LONGEST)

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters of another task, and pairs if the task takes single texts."""
        also = " or `pair`" if "pair" in self.takes else ""
        message = f"a {self.task} model takes single texts; send `text`{also}"
        found = refuse_parameters(request, self.task, self.parameters)
        return found + refuse_kinds(request.instances, self.takes, message)

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedText]:
        """Encodes texts and pairs, cut as in training. Raises SpecError."""
        return self.inputs.encode([text_of(instance) for instance in instances], self.length_limit)

    def complain(self, encoded: Sequence[EncodedText]) -> list[worker_pb2.Violation]:
        """No violations: every text is accepted."""
        return []

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the live module and of this model for the first sequence."""
        row = batch.inputs["input_ids"][:1]
        own: torch.Tensor = self.loaded.model(input_ids=row).logits
        device = next(live.parameters()).device
        return live.model(input_ids=row.to(device)).logits.float().cpu(), own


def refuse_parameters(
    request: model_service_pb2.PredictRequest, task: str, parameters: str
) -> list[worker_pb2.Violation]:
    """A violation if the request has parameters other than `parameters`, the member the task takes (empty: none)."""
    given = request.WhichOneof("parameters")
    if given is None or given == parameters:
        return []
    takes = f"whose parameters are `{parameters}`" if parameters else "which takes no parameters"
    message = f"the model is one for {task}, {takes}; leave `{given}` out"
    return [violation(given, "TASK_MISMATCH", message)]


def refuse_kinds(
    instances: Sequence[model_service_pb2.Instance], takes: Container[str], message: str
) -> list[worker_pb2.Violation]:
    """A violation for each instance of a kind that the task does not take."""
    return [
        violation(f"instances[{index}].{kind}", "TASK_MISMATCH", message)
        for index, instance in enumerate(instances)
        if (kind := instance.WhichOneof("input")) is not None and kind not in takes
    ]


def classification(
    logits_C: torch.Tensor, labels: Sequence[str], *, several: bool, threshold: float
) -> model_service_pb2.Prediction:
    """The likeliest label, or with `several` all labels with a probability of at least `threshold`; and every score."""
    prediction = model_service_pb2.Prediction(logits=logits_C.tolist())
    scores = (logits_C.double().sigmoid() if several else logits_C.double().softmax(-1)).tolist()
    found = prediction.classification
    for label, score in zip(labels, scores, strict=True):
        found.scores.add(label=label, score=score)
    if several:
        found.labels.extend(label for label, score in zip(labels, scores, strict=True) if score >= threshold)
    else:
        found.label = labels[int(logits_C.argmax())]
    return prediction


def classification_bytes(labels: Sequence[str]) -> int:
    """The size of such an answer in bytes, at most."""
    every = sum(len(label.encode()) + 20 for label in labels)
    return 2 * every + 4 * max(len(labels), 1) + 32


def text_of(instance: model_service_pb2.Instance) -> tuple[str, str | None]:
    """An instance's text, and the second text of a pair."""
    if instance.HasField("pair"):
        return instance.pair.text, instance.pair.text_pair
    return instance.text, None
