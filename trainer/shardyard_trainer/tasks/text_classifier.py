"""Answers about texts and pairs: classes of the model, a number, or classes that the caller names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.text import EncodedText
from shardyard_trainer.tasks import zero_shot
from shardyard_trainer.tasks.answers import TextPredictor, classification, classification_bytes
from shardyard_trainer.tasks.base import HuggingFaceModule, Parts, at_once
from shardyard_trainer.tasks.heads import head_outputs


@dataclass(frozen=True)
class ReadText(EncodedText):
    """A text as tokens, and as it is written; empty for a pair."""

    text: str


class Classifier(TextPredictor):
    """Predicts classes or scores of texts and pairs."""

    parameters = "classification"
    takes: tuple[str, ...] = ("text", "pair")

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters of another task, and what does not fit classes of the caller's."""
        if request.HasField("zero_shot"):
            return zero_shot.refuse(request, self.loaded, self.inputs, self.length_limit)
        return super().refuse(request)

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[ReadText]:  # type: ignore[override]
        """Encodes texts and pairs, cut as in training, and keeps the texts. Raises SpecError."""
        found = zip(instances, super().read(instances), strict=True)
        return [ReadText(encoded.ids, encoded.type_ids, instance.text) for instance, encoded in found]

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText]) -> list[int]:
        """The size of a score for each label."""
        labels = request.zero_shot.labels if request.HasField("zero_shot") else self.loaded.folder.labels
        return [classification_bytes(labels)] * len(encoded)

    def answer(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[ReadText], _places: Sequence[int]
    ) -> Parts:
        """The label or labels of each text with all scores, or its number; or those of the caller's labels."""
        if request.HasField("zero_shot"):
            texts = [each.text for each in encoded]
            return zero_shot.answer(request, self.loaded, self.inputs, texts, self.length_limit)
        given = request.classification
        threshold = given.threshold if given.HasField("threshold") else 0.5
        return at_once(
            lambda: [
                self._classify(logits_C, threshold) for logits_C in head_outputs(self.loaded, self.inputs, encoded)
            ]
        )

    def _classify(self, logits_C: torch.Tensor, threshold: float) -> model_service_pb2.Prediction:
        folder = self.loaded.folder
        if folder.problem == "regression":
            prediction = model_service_pb2.Prediction(logits=logits_C.tolist())
            prediction.regression.value = float(logits_C[0])
            return prediction
        return classification(logits_C, folder.labels, several=folder.problem == "multi_label", threshold=threshold)

    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of both heads for all texts of the batch."""
        device = next(live.parameters()).device
        with torch.no_grad():
            outputs = live(
                **{name: tensor.to(device) for name, tensor in batch.inputs.items()}, return_outputs=True
            ).outputs
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        types = batch.inputs.get("token_type_ids", torch.zeros_like(batch.inputs["input_ids"]))
        encoded = [
            EncodedText(ids[:length].tolist(), kinds[:length].tolist())
            for ids, kinds, length in zip(batch.inputs["input_ids"], types, lengths, strict=True)
        ]
        return (outputs or {})["logits"].float().cpu(), head_outputs(self.loaded, self.inputs, encoded)
