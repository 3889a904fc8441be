"""Answers about texts and pairs: classes of the model, a number, or classes that the caller names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.explaining.embeddings import line_of_tokens
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.text import EncodedText
from shardyard_trainer.tasks import zero_shot
from shardyard_trainer.tasks.answers import TextPredictor, classification, classification_bytes, text_of
from shardyard_trainer.tasks.base import Explained, Parts, at_once
from shardyard_trainer.tasks.explained import blank_of, put_words, refuse_any, refuse_name, refuse_word
from shardyard_trainer.tasks.heads import head_outputs, outputs_of
from shardyard_trainer.tasks.module import HuggingFaceModule


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

    def refuse_target(self, request: model_service_pb2.ExplainPredictionRequest) -> list[worker_pb2.Violation]:
        """Refuses a class that the model does not have, and any class of a model that gives a number."""
        labels = self._classes
        of_target = (
            refuse_name(request, labels, "class") if labels else refuse_any(request, "this model gives a number")
        )
        return of_target + refuse_word(request, self.task)

    def complain_target(
        self, _request: model_service_pb2.ExplainPredictionRequest, _encoded: ReadText
    ) -> list[worker_pb2.Violation]:
        """No violations: every class can be explained for every text."""
        return []

    def explain(
        self,
        request: model_service_pb2.ExplainPredictionRequest,
        encoded: ReadText,
        prediction: model_service_pb2.Prediction,
    ) -> Explained:
        """The logit of a class, or the number, by the words of the text or of both texts of a pair."""
        text, pair = text_of(request.instance)
        texts = {"text": text} if pair is None else {"text": text, "text_pair": pair}
        names = list(texts)
        places = [
            None if place is None else (names[place[0]], place[1], place[2])
            for place in self.inputs.places(text, pair, self.length_limit)
        ]
        target = request.target if request.HasField("target") else self._likeliest(prediction)
        output = self._classes.index(target) if target else 0
        blank = blank_of(self.inputs.tokenizer, self.loaded.model)
        blanked = [token if place is None else blank.token for token, place in zip(encoded.ids, places, strict=True)]

        def outputs(count: int) -> torch.Tensor:
            tensors = self.inputs.tensors(self.loaded.model, [encoded] * count)
            return outputs_of(self.loaded, tensors)[:, output]

        def fill(shares_1T: torch.Tensor, explanation: model_service_pb2.Explanation) -> None:
            explanation.target = target
            put_words(explanation, shares_1T, texts, places)

        return Explained(line_of_tokens(self.loaded.model, encoded.ids, blanked, outputs), blank.baseline, fill)

    @property
    def _classes(self) -> Sequence[str]:
        """The names of the outputs; none if the output is a number."""
        return () if self.loaded.folder.problem == "regression" else self.loaded.folder.labels

    def _likeliest(self, prediction: model_service_pb2.Prediction) -> str:
        logits = list(prediction.logits)
        return self._classes[logits.index(max(logits))] if self._classes else ""

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
