"""Metrics of question answering: exact match and F1 by the rules of SQuAD's own scripts, versions 1 and 2."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.questions import QuestionSamples
from shardyard_trainer.tasks.answer_spans import trimmed
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput

THRESHOLD = "no_answer_threshold"
"""The metric that `Predict` reads: no answer is given if its score exceeds the best answer's by more than this."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AnswerMetrics(LossSum):
    """`loss` (nats a window), `exact_match` and `f1` (0 to 1; means over questions, of the best of each one's answers).

    If the model may say that there is no answer, it does so over the threshold with the best `f1`, which is
    `no_answer_threshold`; `has_answer_exact_match`, `has_answer_f1` and `no_answer_accuracy` are those of the
    questions with and without an answer, and `f1_threshold_0` is the F1 without a threshold of its own.
    """

    def __init__(self, samples: QuestionSamples, *, may_abstain: bool) -> None:
        super().__init__()
        self._samples = samples
        self._may_abstain = may_abstain
        self._found: list[np.ndarray] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        names = ("scores", "rests", "firsts", "lasts")
        scores, rests, firsts, lasts = (output.outputs[name].cpu().double().numpy() for name in names)
        store, rows = self._samples.data.store, self._samples.rows(batch.samples)
        first = 0
        for sample in batch.samples:
            num_windows = len(self._samples.rows([sample]))
            part = slice(first, first + num_windows)
            best = first + int(scores[part].argmax())
            row = store.offsets[rows[best]]
            start = store.arrays["begins"][row + int(firsts[best])]
            end = store.arrays["ends"][row + int(lasts[best])]
            self._found.append(np.asarray([sample, start, end, rests[part].min() - scores[best]]))
            first += num_windows

    def part(self) -> Any:
        """Sums of loss and windows; for each question its sample, the offsets of its answer, and how much higher the
        score of no answer is, [4, questions].
        """
        return *super().part(), np.stack(self._found, axis=1) if self._found else np.zeros((4, 0))

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        found = np.concatenate([part[2] for part in parts], axis=1)
        found = found[:, np.argsort(found[0], kind="stable")]
        exact, f1, has_answer = (np.zeros(found.shape[1]) for _ in range(3))
        for at, (sample, start, end, _) in enumerate(found.T):
            question = int(self._samples.questions[int(sample)])
            context = self._samples.data.context(question)
            wanted = [context[begin:stop] for begin, stop in self._samples.data.answers(question)]
            begin, stop = trimmed(context, int(start), int(end))
            exact[at], f1[at] = score(context[begin:stop], wanted)
            has_answer[at] = bool(wanted)
        metrics = {"loss": self.mean(parts)}
        if not self._may_abstain:
            return metrics | {"exact_match": _mean(exact), "f1": _mean(f1)}
        return metrics | abstaining(exact, f1, has_answer > 0, found[3])

    def directions(self) -> Mapping[str, int]:
        """Those of all questions: the evaluation data may have only questions with an answer, or none of these."""
        return {**super().directions(), "exact_match": 1, "f1": 1}


def abstaining(exact: np.ndarray, f1: np.ndarray, has_answer: np.ndarray, margins: np.ndarray) -> dict[str, float]:
    """The metrics of a model that gives no answer if its margin for that exceeds the best threshold."""
    threshold = best_threshold(f1, has_answer, margins)
    abstains = margins > threshold
    exact_now, f1_now = (np.where(abstains, ~has_answer, has_answer * each) for each in (exact, f1))
    plain = np.where(margins > 0, ~has_answer, has_answer * f1)
    return {
        "exact_match": _mean(exact_now),
        "f1": _mean(f1_now),
        "has_answer_exact_match": _mean(exact_now[has_answer]),
        "has_answer_f1": _mean(f1_now[has_answer]),
        "no_answer_accuracy": _mean(f1_now[~has_answer]),
        THRESHOLD: threshold,
        "f1_threshold_0": _mean(plain),
    }


def best_threshold(f1: np.ndarray, has_answer: np.ndarray, margins: np.ndarray) -> float:
    """The threshold with the highest mean F1, half-way between two margins; 0 if one kind of question is missing."""
    if not len(margins) or has_answer.all() or not has_answer.any():
        return 0.0
    order = np.argsort(margins, kind="stable")
    sorted_margins = margins[order]
    # Start with no question answered, then answer them one by one, the lowest margin first.
    gains = np.where(has_answer, f1, -1.0)[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)])
    edges = np.concatenate([[sorted_margins[0] - 1], sorted_margins, [sorted_margins[-1] + 1]])
    is_apart = edges[1:] > edges[:-1]
    best = int(np.argmax(np.where(is_apart, totals, -np.inf)))
    return float((edges[best] + edges[best + 1]) / 2)


def score(answer: str, wanted: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 with the best of the expected answers; without any, every answer is wrong."""
    ours = _words(answer)
    scores = [(float(ours == theirs), _f1(ours, theirs)) for theirs in map(_words, wanted)]
    return max((exact for exact, _ in scores), default=0.0), max((f1 for _, f1 in scores), default=0.0)


def _words(text: str) -> list[str]:
    """The text in lower case, without punctuation, articles and extra spaces."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    same = (Counter(ours) & Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def threshold_of(metrics: Mapping[str, Any]) -> float:
    """The threshold that an evaluation found, as stored in a model's folder; 0 if there is none."""
    found = metrics.get(THRESHOLD)
    return float(found) if isinstance(found, int | float) and np.isfinite(found) else 0.0
