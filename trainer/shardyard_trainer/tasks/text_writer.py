"""The predictor of an encoder-decoder: writes a target for each source, as in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import MicroBatch, seed_for
from shardyard_trainer.inputs.sequences import Marker, SequenceInputs
from shardyard_trainer.inputs.text import EncodedText
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.generation import end_tokens
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answers import TOKEN_BYTES, TextPredictor
from shardyard_trainer.tasks.base import Parts, violation
from shardyard_trainer.tasks.generate import TEXTS_AT_ONCE
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.sampling import Sampling, sampling_of
from shardyard_trainer.tasks.writing import step, write_texts


class TextWriter(TextPredictor):
    """Writes a target for each source, as the evaluation did."""

    parameters = "generation"
    keeps_special = False
    """Whether special tokens are part of the answer."""

    def __init__(self, task: str, loaded: Loaded, inputs: SequenceInputs) -> None:
        super().__init__(task, loaded, inputs)
        config, settings = loaded.model.config, dict(loaded.generation)
        start = settings.get("decoder_start_token_id", getattr(config, "decoder_start_token_id", None))
        start = architectures.usual_start(config) if start is None else start
        if not isinstance(start, int) or not 0 <= start < config.vocab_size:
            text = f"decoder_start_token_id is {start}, which is not one of the {config.vocab_size:,} tokens"
            raise FolderInvalid(text, file="generation_config.json")
        self._start = start
        # The older setting counts the start token.
        if "max_length" in settings and "max_new_tokens" not in settings:
            settings["max_new_tokens"] = max(settings["max_length"] - 1, 0)
        self._settings = settings
        self._mark: Marker | None = None
        if isinstance(name := loaded.folder.trained.get("source_token"), str):
            self._mark = Marker(inputs.tokenizer, inputs.tokenizer.get_vocab().get(name), self.length_limit)

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses what every text task refuses, and beams together with a temperature."""
        found = super().refuse(request)
        how = self._how(request)
        if how.num_beams > 1 and how.temperature > 0 and request.generation.HasField("temperature"):
            message = (
                f"{how.num_beams} beams beside a temperature of {how.temperature:g}; set num_beams 1, or temperature 0"
            )
            found.append(violation("generation.temperature", "SPEC_INVALID", message))
        return found

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedText]:
        """Encodes texts after the prefix of training, cut as in training."""
        prefix = self.loaded.folder.trained.get("source_prefix")
        prefix = prefix if isinstance(prefix, str) else ""
        encoded = self.inputs.encode([(prefix + instance.text, None) for instance in instances], self.length_limit)
        if self._mark is None:
            return encoded
        marks = [self._mark(each.ids) for each in encoded]
        return [EncodedText(ids, [0] * len(ids)) for ids in marks]

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText]) -> list[int]:
        """The size of as many tokens as the request allows."""
        return [self._how(request).max_new_tokens * TOKEN_BYTES + 16] * len(encoded)

    def answer(
        self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedText], places: Sequence[int]
    ) -> Parts:
        """The target of each source; `places` seed the sampling. Sources of one length are computed together."""
        how = self._how(request)
        answers: dict[int, model_service_pb2.Prediction] = {}
        for indices in _of_one_length(encoded, max(TEXTS_AT_ONCE // how.num_beams, 1)):
            inputs = self.inputs.tensors(self.loaded.model, [encoded[index] for index in indices])
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            seeds = [seed_for("generate", how.seed, places[index]) for index in indices]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            written = yield from write_texts(self._forward, inputs, how, start=self._start, generators=generators)
            for index, tokens in zip(indices, written, strict=True):
                text = read_tokens(self.inputs.tokenizer, tokens, keeps_special=self.keeps_special)
                answers[index] = model_service_pb2.Prediction(generated_text=text)
        return [answers[index] for index in range(len(encoded))]

    def _forward(self, **inputs: Any) -> Any:
        # Set around each step only: a mode held over a `yield` would also apply to other computations.
        with torch.inference_mode():
            return step(self.loaded.model, **inputs)

    def _how(self, request: model_service_pb2.PredictRequest) -> Sampling:
        ends = frozenset(end_tokens(self.loaded.model.config, self._settings, self.inputs.tokenizer))
        return sampling_of(request.generation, self._settings, ends)

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the live model and of this one for the first sample, over its whole target."""
        inputs = {name: tensor[:1] for name, tensor in batch.inputs.items() if name != "labels"}
        device = next(live.parameters()).device
        wanted = live.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu()
        own: torch.Tensor = self.loaded.model(**inputs).logits
        return wanted, own


def read_tokens(tokenizer: Any, tokens: Sequence[int], *, keeps_special: bool) -> str:
    """Written tokens as a text."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=not keeps_special)
    return text.strip()


def _of_one_length(encoded: Sequence[EncodedText], most: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for index, each in enumerate(encoded):
        by_length.setdefault(len(each.ids), []).append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), most):
            yield indices[first : first + most]
