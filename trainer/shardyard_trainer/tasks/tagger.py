"""Answers with a model that tags words: the tag of each word, and the entities that the tags mark."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.tags import entities, parts
from shardyard_trainer.data.word_split import split_words
from shardyard_trainer.explaining.embeddings import line_of_tokens
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.inputs.words import Window, WordCutter
from shardyard_trainer.models import architectures
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answers import TextPredictor, text_of
from shardyard_trainer.tasks.base import Explained, Parts, at_once, violation
from shardyard_trainer.tasks.explained import blank_of, put_words, refuse_name
from shardyard_trainer.tasks.module import HuggingFaceModule

DEFAULT_OVERLAP = 32


@dataclasses.dataclass(frozen=True)
class EncodedWords:
    """A text's words with their places in it, and the windows that answer for them."""

    text: str
    places: list[tuple[int, int]]
    windows: list[Window]

    @property
    def num_positions(self) -> int:
        """The positions of its longest window."""
        return max(len(window.ids) for window in self.windows)


class Tagger(TextPredictor):
    """Predicts the tags of words and the entities they mark."""

    takes = ("text", "words")

    def __init__(self, task: str, loaded: Loaded, inputs: TextInputs) -> None:
        super().__init__(task, loaded, inputs)
        overlap = loaded.folder.trained.get("overlap")
        self._cutter = WordCutter(
            inputs.tokenizer,
            self.length_limit,
            overlap if isinstance(overlap, int) and overlap >= 0 else DEFAULT_OVERLAP,
        )

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedWords]:  # type: ignore[override]
        """Encodes texts as words: as sent, or split into words and signs. Raises SpecError."""
        return [self._read(instance) for instance in instances]

    def _read(self, instance: model_service_pb2.Instance) -> EncodedWords:
        if instance.HasField("words"):
            words = list(instance.words.words)
            ends = np.cumsum([len(word) + 1 for word in words]).tolist()
            places = [(end - len(word) - 1, end - 1) for word, end in zip(words, ends, strict=True)]
            return EncodedWords(" ".join(words), places, self._cutter.cut(words))
        text, _ = text_of(instance)
        places = split_words(text)
        return EncodedWords(text, places, self._cutter.cut([text[first:end] for first, end in places]))

    def most_bytes(self, _request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedWords]) -> list[int]:
        """The size of a tag for each word, and of one entity for each."""
        longest = max((len(label.encode()) for label in self.loaded.folder.labels), default=0)
        return [len(each.places) * 2 * (longest + 48) + 4 * len(each.text) + 32 for each in encoded]

    def answer(
        self, _request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedWords], _places: Sequence[int]
    ) -> Parts:
        """The tag of each word, and entities."""
        return at_once(lambda: [self._tag(each) for each in encoded])

    @torch.inference_mode()
    def _tag(self, encoded: EncodedWords) -> model_service_pb2.Prediction:
        labels = self.loaded.folder.labels
        # A word without a token (such as a lone control character) gets the tag of most words.
        nothing = labels.index("O") if "O" in labels else 0
        classes, scores = [nothing] * len(encoded.places), [0.0] * len(encoded.places)
        for window in encoded.windows:
            if not any(window.firsts):
                continue
            logits_TC = self.loaded.model(**self._tensors(window)).logits[0].double().softmax(-1).cpu()
            for place, (word, is_first) in enumerate(zip(window.words, window.firsts, strict=True)):
                if is_first:
                    classes[word] = int(logits_TC[place].argmax())
                    scores[word] = float(logits_TC[place, classes[word]])
        return self._prediction(encoded, [labels[each] for each in classes], scores)

    def refuse_target(self, request: model_service_pb2.ExplainPredictionRequest) -> list[worker_pb2.Violation]:
        """Refuses a tag that the model does not have."""
        return refuse_name(request, self.loaded.folder.labels, "tag")

    def complain_target(
        self, request: model_service_pb2.ExplainPredictionRequest, encoded: EncodedWords
    ) -> list[worker_pb2.Violation]:
        """Reports a text without words, and a word that is not there or that the model cannot read."""
        read = {word for window in encoded.windows for word in window.words}
        if not read - {-1}:
            text = "it has no word that the model can read; send at least one"
            return [violation(f"instance.{request.instance.WhichOneof('input')}", "SPEC_INVALID", text)]
        if not request.HasField("word") or request.word in read:
            return []
        count = len(encoded.places)
        what = f"the text has {count:,} words, counted from 0"
        if request.word < count:
            what = "the model has no token for this word"
        return [violation("word", "SPEC_INVALID", f"`{request.word}`: {what}; give another one, or leave it out")]

    def explain(
        self,
        request: model_service_pb2.ExplainPredictionRequest,
        encoded: EncodedWords,
        prediction: model_service_pb2.Prediction,
    ) -> Explained:
        """The logit of a tag at the first token of a word, by the words of its window."""
        labels, tags = self.loaded.folder.labels, prediction.tagged_words.tags
        word = request.word if request.HasField("word") else _surest(encoded, tags)
        target = request.target if request.HasField("target") else tags[word].tag
        window = next(each for each in encoded.windows if word in each.words)
        place, output = window.words.index(word), labels.index(target)
        blank = blank_of(self.inputs.tokenizer, self.loaded.model)
        blanked = [token if of < 0 else blank.token for token, of in zip(window.ids, window.read, strict=True)]
        tensors = self._tensors(window)
        part = request.instance.WhichOneof("input") or ""
        places = [None if of < 0 else (part, *encoded.places[of]) for of in window.read]

        def outputs(count: int) -> torch.Tensor:
            rows = {name: tensor.expand(count, -1) for name, tensor in tensors.items()}
            logits_NTC: torch.Tensor = self.loaded.model(**rows).logits
            return logits_NTC[:, place, output]

        def fill(shares_1T: torch.Tensor, explanation: model_service_pb2.Explanation) -> None:
            explanation.target, explanation.word = target, word
            put_words(explanation, shares_1T, {part: encoded.text}, places)

        return Explained(line_of_tokens(self.loaded.model, window.ids, blanked, outputs), blank.baseline, fill)

    def _tensors(self, window: Window) -> dict[str, torch.Tensor]:
        device = next(self.loaded.model.parameters()).device
        tensors = {
            "input_ids": torch.tensor([window.ids]),
            "attention_mask": torch.ones(1, len(window.ids), dtype=torch.long),
        }
        if architectures.has_token_types(self.loaded.model.config):
            tensors["token_type_ids"] = torch.tensor([window.type_ids])
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _prediction(self, encoded: EncodedWords, tags: list[str], scores: list[float]) -> model_service_pb2.Prediction:
        prediction = model_service_pb2.Prediction()
        found = prediction.tagged_words
        found.SetInParent()
        for (start, end), tag, score in zip(encoded.places, tags, scores, strict=True):
            found.tags.add(start=start, end=end, tag=tag, score=score)
        if any(parts(label)[0] for label in self.loaded.folder.labels):
            for kind, first, last in entities(tags):
                start, end = encoded.places[first][0], encoded.places[last - 1][1]
                score = float(np.mean(scores[first:last]))
                found.entities.add(label=kind, text=encoded.text[start:end], start=start, end=end, score=score)
        return prediction

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of both models at all real positions of the batch."""
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
        real_BT = batch.inputs["attention_mask"] > 0
        device = next(live.parameters()).device
        wanted = live.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu()
        own: torch.Tensor = self.loaded.model(**inputs).logits
        return wanted[real_BT], own[real_BT]


def _surest(encoded: EncodedWords, tags: Sequence[model_service_pb2.Tag]) -> int:
    """The word with the likeliest tag, of those that are something if there are any."""
    read = sorted({word for window in encoded.windows for word in window.words} - {-1})
    named = [word for word in read if tags[word].tag != "O"]
    return max(named or read, key=lambda word: tags[word].score)
