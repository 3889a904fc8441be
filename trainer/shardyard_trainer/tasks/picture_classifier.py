"""The predictor of a picture classifier.

Shape suffixes: B pictures, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.explaining.integral import Line
from shardyard_trainer.explaining.regions import grey, shares_of_regions
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.image import EncodedPicture, ImageInputs, complaints
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.loading import number_parameter
from shardyard_trainer.tasks.answers import classification, classification_bytes, refuse_kinds, refuse_parameters
from shardyard_trainer.tasks.base import Explained, Parts, at_once, violation
from shardyard_trainer.tasks.explained import refuse_name, refuse_word
from shardyard_trainer.tasks.module import HuggingFaceModule


@dataclasses.dataclass(frozen=True)
class PictureClassifier:
    """Predicts the classes of pictures."""

    parameters: ClassVar[str] = "classification"
    takes: ClassVar[tuple[str, ...]] = ("image",)

    task: str
    loaded: Loaded
    inputs: ImageInputs

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters of another task, and instances that are not pictures."""
        message = f"a {self.task} model takes pictures; send the bytes of a file as `image`"
        found = refuse_parameters(request, self.task, self.parameters)
        return found + refuse_kinds(request.instances, self.takes, message)

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedPicture]:
        """Decodes pictures; `complain` reports those that failed."""
        return [self.inputs.encode_or_say(instance.image) for instance in instances]

    def complain(self, encoded: Sequence[EncodedPicture]) -> list[worker_pb2.Violation]:
        """Reports bytes that are not a picture."""
        return [violation(field, "DATA_INVALID", message) for field, message in complaints(encoded)]

    def most_bytes(self, _request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedPicture]) -> list[int]:
        """The size of a score for each label."""
        return [classification_bytes(self.loaded.folder.labels)] * len(encoded)

    def answer(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedPicture], _places: Sequence[int]
    ) -> Parts:
        """The label or labels of each picture, with all scores."""
        given, folder = request.classification, self.loaded.folder
        threshold = given.threshold if given.HasField("threshold") else 0.5
        several = folder.problem == "multi_label"
        return at_once(
            lambda: [
                classification(logits_C, folder.labels, several=several, threshold=threshold)
                for logits_C in self._logits(encoded)
            ]
        )

    def refuse_target(self, request: model_service_pb2.ExplainPredictionRequest) -> list[worker_pb2.Violation]:
        """Refuses a class that the model does not have."""
        return refuse_name(request, self.loaded.folder.labels, "class") + refuse_word(request, self.task)

    def complain_target(
        self, _request: model_service_pb2.ExplainPredictionRequest, _encoded: EncodedPicture
    ) -> list[worker_pb2.Violation]:
        """No violations: every class can be explained for every picture."""
        return []

    def explain(
        self,
        request: model_service_pb2.ExplainPredictionRequest,
        encoded: EncodedPicture,
        prediction: model_service_pb2.Prediction,
    ) -> Explained:
        """The logit of a class, by the regions of the picture."""
        labels, model, settings = self.loaded.folder.labels, self.loaded.model, self.inputs.settings
        logits = list(prediction.logits)
        target = request.target if request.HasField("target") else labels[logits.index(max(logits))]
        output = labels.index(target)
        size = self.inputs.read(request.instance.image).size
        end = self.inputs.tensors(model, [encoded])["pixel_values"]

        def outputs(rows_NCHW: torch.Tensor) -> torch.Tensor:
            # A model may change its input in place, which the rows of a line do not allow.
            logits_NC: torch.Tensor = model(pixel_values=rows_NCHW.clone()).logits
            return logits_NC[:, output]

        def fill(shares_1HW: torch.Tensor, explanation: model_service_pb2.Explanation) -> None:
            explanation.target = target
            explanation.regions.CopyFrom(shares_of_regions(shares_1HW, model.config, settings, size))

        line = Line(grey(settings).to(end), end, outputs, encoded.num_positions, vector_dim=1)
        return Explained(line, "a picture that is grey all over", fill)

    @torch.inference_mode()
    def _logits(self, encoded: Sequence[EncodedPicture]) -> torch.Tensor:
        logits_BC: torch.Tensor = self.loaded.model(**self.inputs.tensors(self.loaded.model, encoded)).logits
        return logits_BC.float().cpu()

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of both models for all pictures of the batch."""
        parameter = number_parameter(live)
        pixels = batch.inputs["pixel_values"]
        wanted = live.model(pixel_values=pixels.to(parameter.device, parameter.dtype)).logits.float().cpu()
        return wanted, self._logits([EncodedPicture(each.numpy()) for each in pixels])
