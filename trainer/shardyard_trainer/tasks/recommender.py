"""The predictor of a model over items: the likeliest items of the catalogue, by their own ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import listed, nearest
from shardyard_trainer.explaining.embeddings import line_of_tokens
from shardyard_trainer.explaining.integral import Unexplainable
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.items import PADDING, EncodedHistory, ItemInputs
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answers import refuse_kinds, refuse_parameters
from shardyard_trainer.tasks.base import Explained, Parts, at_once, violation
from shardyard_trainer.tasks.explained import refuse_name, refuse_word
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.ranking import without_seen

DEFAULT_TOP_K = 10
_NUMBER_BYTES = 16

Logits = Callable[[Loaded, Sequence[Sequence[int]]], torch.Tensor]


class Recommender:
    """Recommends items for histories; `logits` returns those of the next item, fp32 [B, V]."""

    parameters = "recommendation"
    takes = ("items",)

    def __init__(self, task: str, loaded: Loaded, inputs: ItemInputs, logits: Logits) -> None:
        self._logits = logits
        self.task = task
        self.loaded = loaded
        self.inputs = inputs

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters of another task, and instances that are not histories."""
        message = f"a {self.task} model takes histories; send `items`, such as {', '.join(self.inputs.items[:3])}"
        found = refuse_parameters(request, self.task, self.parameters)
        return found + refuse_kinds(request.instances, self.takes, message)

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedHistory]:
        """Encodes histories; unknown items are skipped."""
        return [self.inputs.encode(instance.items.items) for instance in instances]

    def complain(self, encoded: Sequence[EncodedHistory]) -> list[worker_pb2.Violation]:
        """Reports histories without a known item."""
        found = []
        for index, history in enumerate(encoded):
            if not history.ids:
                unknown = listed(history.unknown, most=3)
                hint = nearest(history.unknown[0], self.inputs.items) if history.unknown else ""
                what = f"the model knows none of these items ({unknown})" if history.unknown else "no items"
                message = f"{what}; send at least one of its catalogue{hint}"
                found.append(violation(f"instances[{index}].items", "SPEC_INVALID", message))
        return found

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedHistory]) -> list[int]:
        """The size of as many items as requested, and of the unknown ones."""
        longest = max(len(item.encode()) for item in self.inputs.items)
        most = min(self._top_k(request), len(self.inputs.items))
        unknown = (sum(len(item.encode()) + 4 for item in history.unknown) for history in encoded)
        return [most * (longest + _NUMBER_BYTES) + size + 16 for size in unknown]

    def answer(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedHistory], _places: Sequence[int]
    ) -> Parts:
        """The likeliest items of each history."""
        return at_once(lambda: self._rank(request, encoded))

    @torch.inference_mode()
    def _rank(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedHistory]
    ) -> list[model_service_pb2.Prediction]:
        given = request.recommendation
        as_trained = self.loaded.folder.trained.get("exclude_seen") is not False
        excludes = given.exclude_seen if given.HasField("exclude_seen") else as_trained
        predictions = []
        for history, logits_V in zip(
            encoded, self._logits(self.loaded, [each.ids for each in encoded]).double(), strict=True
        ):
            totals = logits_V[PADDING + 1 :].logsumexp(0)
            seen_1S = torch.tensor([history.seen if excludes else []], dtype=torch.long)
            best = without_seen(logits_V[None], seen_1S)[0].topk(min(self._top_k(request), len(logits_V)))
            prediction = model_service_pb2.Prediction()
            prediction.ranked_items.unknown_items.extend(history.unknown)
            for logit, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if logit > -math.inf:
                    score = math.exp(logit - float(totals))
                    prediction.ranked_items.items.add(item=self.inputs.items[token - 1], score=score)
            predictions.append(prediction)
        return predictions

    @staticmethod
    def _top_k(request: model_service_pb2.PredictRequest) -> int:
        given = request.recommendation
        return given.top_k if given.HasField("top_k") else DEFAULT_TOP_K

    def refuse_target(self, request: model_service_pb2.ExplainPredictionRequest) -> list[worker_pb2.Violation]:
        """Refuses an item that the model does not know."""
        return refuse_name(request, self.inputs.items, "item") + refuse_word(request, self.task)

    def complain_target(
        self, _request: model_service_pb2.ExplainPredictionRequest, _encoded: EncodedHistory
    ) -> list[worker_pb2.Violation]:
        """No violations: every item can be explained for every history."""
        return []

    def explain(
        self,
        request: model_service_pb2.ExplainPredictionRequest,
        encoded: EncodedHistory,
        prediction: model_service_pb2.Prediction,
    ) -> Explained:
        """The logit of an item, by the items of the history."""
        best = prediction.ranked_items.items
        if not request.HasField("target") and not best:
            raise Unexplainable("it recommends no item for this history; name one as target")
        target = request.target if request.HasField("target") else best[0].item
        (token,) = self.inputs.encode([target]).ids
        blank, what = (len(self.inputs.items) + 1, "the mask") if self.inputs.masks else (PADDING, "the padding")

        def outputs(count: int) -> torch.Tensor:
            return self._logits(self.loaded, [encoded.ids] * count)[:, token]

        def fill(shares_1T: torch.Tensor, explanation: model_service_pb2.Explanation) -> None:
            explanation.target = target
            self._put_items(explanation, request.instance.items.items, shares_1T[0].tolist(), encoded)

        line = line_of_tokens(self.loaded.model, encoded.ids, [blank] * len(encoded.ids), outputs)
        return Explained(line, f"a history of as many places, each with {what} in the place of an item", fill)

    def _put_items(
        self,
        explanation: model_service_pb2.Explanation,
        history: Sequence[str],
        shares: Sequence[float],
        encoded: EncodedHistory,
    ) -> None:
        unknown = {*encoded.unknown}
        known = [at for at, item in enumerate(history) if item not in unknown]
        read = dict(zip(known[len(known) - len(encoded.ids) :], shares, strict=False))
        for at, item in enumerate(history):
            explanation.attributions.add(
                part="items", text=item, start=at, end=at + 1, score=read.get(at, 0.0), unread=at not in read
            )
        explanation.rest = sum(shares[len(encoded.ids) :])

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the live module and of this model for the first history."""
        row = batch.inputs["input_ids"][:1]
        own: torch.Tensor = self.loaded.model(input_ids=row).logits
        device = next(live.parameters()).device
        return live.model(input_ids=row.to(device)).logits.float().cpu(), own
