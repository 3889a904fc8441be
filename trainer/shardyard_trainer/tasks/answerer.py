"""The predictor of question answering: windows over each context, and the best parts of all windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import MicroBatch, batches
from shardyard_trainer.inputs.contexts import ContextCutter, ContextWindow
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answer_explained import Answering, AskedTexts, explain_answer
from shardyard_trainer.tasks.answer_metrics import threshold_of
from shardyard_trainer.tasks.answer_spans import best_spans, rest_place, span_logits, trimmed
from shardyard_trainer.tasks.answers import TextPredictor, refuse_kinds, refuse_parameters
from shardyard_trainer.tasks.base import Explained, Parts, violation
from shardyard_trainer.tasks.explained import refuse_any, refuse_word
from shardyard_trainer.tasks.module import HuggingFaceModule

DEFAULT_WINDOW, DEFAULT_OVERLAP, DEFAULT_LONGEST, DEFAULT_TOP_K = 384, 128, 30, 5
_CHARACTER_BYTES = 4


@dataclass(frozen=True)
class EncodedQuestion:
    """A question's context and windows; `blank`: the field that has nothing to read, if there is one."""

    context: str
    windows: list[ContextWindow]
    blank: str

    @property
    def num_positions(self) -> int:
        """The positions of its longest window."""
        return max((len(window.ids) for window in self.windows), default=1)


class Part(NamedTuple):
    """A part of a context and its score, the sum of two logits."""

    score: float
    start: int
    end: int


class QuestionAnswerer(TextPredictor):
    """Answers questions from their contexts."""

    parameters = "question_answering"
    takes = ("question", "pair")

    def __init__(self, task: str, loaded: Loaded, inputs: TextInputs) -> None:
        super().__init__(task, loaded, inputs)
        trained = loaded.folder.trained
        self._longest = _setting(trained.get("max_answer_length"), DEFAULT_LONGEST, "max_answer_length", least=1)
        default = min(DEFAULT_OVERLAP, self.length_limit // 3)
        overlap = _setting(trained.get("overlap"), default, "overlap", least=0)
        self._cutter = ContextCutter(inputs.tokenizer, self.length_limit, overlap)
        self._rest = rest_place(loaded.model.config, self._cutter)
        metrics = trained.get("metrics")
        self._threshold: float | None = None
        if trained.get("allow_no_answer") is True:
            self._threshold = threshold_of(metrics) if isinstance(metrics, dict) else 0.0

    @property
    def length_limit(self) -> int:
        """The tokens of a window: as in training, else the smaller of the default and the model's limit."""
        known = (self.loaded.folder.max_length or DEFAULT_WINDOW, self.loaded.longest)
        return min(limit for limit in known if limit is not None)

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters of another task, and instances that are not a question with its context."""
        message = f"a {self.task} model takes a question with its context; send `question`, or `pair` in this order"
        found = refuse_parameters(request, self.task, self.parameters)
        if request.question_answering.HasField("threshold") and self._rest is None:
            text = "this model has no token that says that there is no answer; leave the threshold out"
            found.append(violation("question_answering.threshold", "SPEC_INVALID", text))
        return found + refuse_kinds(request.instances, self.takes, message)

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedQuestion]:  # type: ignore[override]
        """Encodes questions with their contexts as windows. Raises SpecError."""
        asked = [_asked(instance) for instance in instances]
        cut = self._cutter.cut(asked)
        return [
            EncodedQuestion(context, found.windows, _blank(instance, question, context, found.windows))
            for instance, (question, context), found in zip(instances, asked, cut, strict=True)
        ]

    def complain(self, encoded: Sequence[EncodedQuestion]) -> list[worker_pb2.Violation]:  # type: ignore[override]
        """Reports blank questions and contexts."""
        message = "it is blank; give a question, and a context with something to read"
        return [
            violation(f"instances[{at}].{each.blank}", "SPEC_INVALID", message)
            for at, each in enumerate(encoded)
            if each.blank
        ]

    def most_bytes(self, request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedQuestion]) -> list[int]:
        """The size of the requested candidates and the answer, each of the largest length."""
        asked = request.question_answering
        longest, most = asked.max_answer_length or self._longest, asked.top_k or DEFAULT_TOP_K
        return [(most + 1) * (_most_text_bytes(each, longest) + 40) + 32 for each in encoded]

    def answer(
        self,
        request: model_service_pb2.PredictRequest,
        encoded: Sequence[EncodedQuestion],
        _places: Sequence[int],
    ) -> Parts:
        """The best part of each context, or no answer."""
        asked = request.question_answering
        longest, most = asked.max_answer_length or self._longest, asked.top_k or DEFAULT_TOP_K
        threshold = asked.threshold if asked.HasField("threshold") else self._threshold
        windows = [(at, window) for at, each in enumerate(encoded) for window in each.windows]
        parts: list[list[Part]] = [[] for _ in encoded]
        rests, totals = [math.inf] * len(encoded), [-math.inf] * len(encoded)
        for batch in batches([window for _, window in windows]):
            for at, (found, rest, total) in zip(batch, self._read_windows(windows, batch, longest, most), strict=True):
                question = windows[at][0]
                parts[question] += found
                rests[question] = min(rests[question], rest)
                totals[question] = _log_sum(totals[question], total)
            yield
        return [
            _prediction(each.context, sorted(set(own), key=_best_first), rest, total, threshold=threshold, most=most)
            for each, own, rest, total in zip(encoded, parts, rests, totals, strict=True)
        ]

    def refuse_target(self, request: model_service_pb2.ExplainPredictionRequest) -> list[worker_pb2.Violation]:
        """Refuses every target: the answer itself is explained."""
        why = "the score of the answer that the model gives is what can be explained"
        return refuse_any(request, why) + refuse_word(request, self.task)

    def complain_target(
        self, _request: model_service_pb2.ExplainPredictionRequest, _encoded: EncodedQuestion
    ) -> list[worker_pb2.Violation]:
        """No violations: there is no target to choose."""
        return []

    def explain(
        self,
        request: model_service_pb2.ExplainPredictionRequest,
        encoded: EncodedQuestion,
        prediction: model_service_pb2.Prediction,
    ) -> Explained:
        """The sum of the logits of the answer's first and last token, by the words of its window."""
        names = ("text", "text_pair") if request.instance.HasField("pair") else ("question", "context")
        asked = AskedTexts(*_asked(request.instance), names, encoded.windows)
        by = Answering(self.loaded, self.inputs, self._cutter, self._rest)
        return explain_answer(by, asked, prediction.answer)

    @torch.inference_mode()
    def _read_windows(
        self, windows: Sequence[tuple[int, ContextWindow]], batch: Sequence[int], longest: int, most: int
    ) -> Iterator[tuple[list[Part], float, float]]:
        """The best parts of each window, its score of no answer, and the log-sum of all parts' scores."""
        chosen = [windows[at][1] for at in batch]
        texts = [EncodedText(window.ids, window.type_ids) for window in chosen]
        logits = span_logits(self.loaded.model, self.inputs.tensors(self.loaded.model, texts)).cpu()
        bounds = torch.tensor([[window.first, window.end] for window in chosen])
        rest = self._rest or 0
        rests = torch.tensor([rest + len(window.ids) * (rest < 0) for window in chosen])
        found = best_spans(logits, bounds, rests, longest=longest, most=most)
        for row, window in enumerate(chosen):
            parts = [
                Part(float(score), window.offsets[first - window.first][0], window.offsets[last - window.first][1])
                for score, first, last in zip(
                    found.scores_WK[row], found.firsts_WK[row].tolist(), found.lasts_WK[row].tolist(), strict=True
                )
                if score > -math.inf
            ]
            yield parts, float(found.rests_W[row]), float(found.totals_W[row])

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of both models at all real positions of the batch."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch.inputs[name] for name in names if name in batch.inputs}
        real_WT = batch.inputs["attention_mask"] > 0
        device = next(live.parameters()).device
        wanted = span_logits(live.model, {name: tensor.to(device) for name, tensor in inputs.items()}).float().cpu()
        return wanted[real_WT], span_logits(self.loaded.model, inputs)[real_WT]


def _setting(value: object, default: int, name: str, *, least: int) -> int:
    """Reads a number of shardyard.json. Raises FolderInvalid if it is not one."""
    if value is None:
        return default
    if type(value) is not int or value < least:
        text = f"shardyard.json has the {name} {str(value)[:100]!r}, which is not a number from {least} on"
        raise FolderInvalid(f"{text}; take the folder as exported", file="shardyard.json")
    return value


def _asked(instance: model_service_pb2.Instance) -> tuple[str, str]:
    if instance.HasField("pair"):
        return instance.pair.text, instance.pair.text_pair
    return instance.question.question, instance.question.context


def _blank(instance: model_service_pb2.Instance, question: str, context: str, windows: Sequence[ContextWindow]) -> str:
    names = ("pair.text", "pair.text_pair") if instance.HasField("pair") else ("question.question", "question.context")
    if not question.strip():
        return names[0]
    return names[1] if not context.strip() or not windows else ""


def _most_text_bytes(encoded: EncodedQuestion, longest: int) -> int:
    """The largest number of bytes in this many tokens, at most."""
    characters = max(
        (
            window.offsets[min(at + longest, len(window.offsets)) - 1][1] - start
            for window in encoded.windows
            for at, (start, _) in enumerate(window.offsets)
        ),
        default=0,
    )
    return characters * (1 if encoded.context.isascii() else _CHARACTER_BYTES)


def _best_first(part: Part) -> tuple[float, int, int]:
    return -part.score, part.start, part.end


def _log_sum(one: float, other: float) -> float:
    if math.isnan(one) or math.isnan(other):
        return math.nan
    highest = max(one, other)
    return highest if highest == -math.inf else highest + math.log(math.exp(one - highest) + math.exp(other - highest))


def _prediction(
    context: str, parts: Sequence[Part], rest: float, total: float, *, threshold: float | None, most: int
) -> model_service_pb2.Prediction:
    """The answer from the parts, sorted best first; `total` is the log-sum of the scores of all parts.

    Without a part the model's logits are NaN: the answer is empty, and its scores are NaN too.
    """
    prediction = model_service_pb2.Prediction()
    answer = prediction.answer
    answer.SetInParent()
    if threshold is not None:
        total = _log_sum(total, rest)
        answer.no_answer_score = math.exp(rest - total)
    seen: set[tuple[int, int]] = set()
    for part in parts:
        start, end = trimmed(context, part.start, part.end)
        # Two overlapping windows may contain the same part.
        if start == end or (start, end) in seen or len(seen) == most:
            continue
        seen.add((start, end))
        answer.candidates.add(text=context[start:end], start=start, end=end, score=math.exp(part.score - total))
    if not parts:
        answer.score = math.nan
        return prediction
    abstains = threshold is not None and rest - parts[0].score > threshold
    if abstains or not answer.candidates:
        answer.score = answer.no_answer_score
    else:
        best = answer.candidates[0]
        answer.text, answer.start, answer.end, answer.score = best.text, best.start, best.end, best.score
    return prediction
