"""Metrics of tagging: by word, and by whole entity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardyard_trainer.data.tags import PLAIN, entities
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.tagged import IGNORED, TaggedSamples
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput


class TagMetrics(LossSum):
    """`loss` (nats a word), `token_accuracy`, and by scheme: precision, recall and F1 of whole entities; or macro F1.

    An entity counts if its kind, its first word and its last one are right (strict BIO). `majority_token_accuracy` and
    `majority_f1` (or `majority_f1_macro`) are the results of answering every word with the most frequent tag.
    """

    def __init__(self, labels: Sequence[str], scheme: str, samples: TaggedSamples) -> None:
        super().__init__()
        self._labels = labels
        self._scheme = scheme
        self._samples = samples
        self._found: list[np.ndarray] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        labels, answers = batch.inputs["labels"].cpu().numpy(), output.outputs["answers"].cpu().numpy()
        rows, places = np.nonzero(labels != IGNORED)
        samples = np.asarray(batch.samples)[rows]
        self._found.append(np.stack([samples, labels[rows, places], answers[rows, places]]))

    def part(self) -> Any:
        """Sums of loss and words; samples, labels and answers [3, words]."""
        return *super().part(), np.concatenate(self._found, axis=1) if self._found else np.zeros((3, 0), np.int64)

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        found = np.concatenate([part[2] for part in parts], axis=1)
        # Sorted by window: the windows of a text are consecutive, and each word is in one of them.
        found = found[:, np.argsort(found[0], kind="stable")]
        truth, answers = found[1], found[2]
        majority = np.full_like(truth, np.bincount(truth).argmax() if len(truth) else 0)
        metrics = {
            "loss": self.mean(parts),
            "token_accuracy": _accuracy(truth, answers),
            "majority_token_accuracy": _accuracy(truth, majority),
        }
        if self._scheme == PLAIN:
            return metrics | {"f1_macro": _macro_f1(truth, answers), "majority_f1_macro": _macro_f1(truth, majority)}
        texts = self._samples.text_of(found[0])
        wanted = self._tags(truth, texts)
        trivial = _entity_scores(wanted, self._tags(majority, texts))["f1"]
        return metrics | _entity_scores(wanted, self._tags(answers, texts)) | {"majority_f1": trivial}

    def directions(self) -> Mapping[str, int]:
        """By scheme; those of a single kind of entity are left out, since the evaluation data may have none of it."""
        of_scheme = ("f1_macro",) if self._scheme == PLAIN else ("f1", "precision", "recall")
        return {**super().directions(), **dict.fromkeys(("token_accuracy", *of_scheme), 1)}

    def _tags(self, classes: np.ndarray, texts: np.ndarray) -> list[list[str]]:
        starts = np.flatnonzero(np.diff(texts, prepend=-1))
        return [[self._labels[each] for each in part] for part in np.split(classes, starts[1:])] if len(texts) else []


def _accuracy(truth: np.ndarray, answers: np.ndarray) -> float:
    return float((truth == answers).mean()) if len(truth) else 0.0


def _entity_scores(truth: list[list[str]], answers: list[list[str]]) -> dict[str, float]:
    wanted, given, right = Counter[str](), Counter[str](), Counter[str]()
    for tags, found in zip(truth, answers, strict=True):
        theirs, ours = set(entities(tags)), set(entities(found))
        wanted.update(kind for kind, _, _ in theirs)
        given.update(kind for kind, _, _ in ours)
        right.update(kind for kind, _, _ in theirs & ours)
    precision, recall = right.total() / max(given.total(), 1), right.total() / max(wanted.total(), 1)
    scores = {"precision": precision, "recall": recall, "f1": _f1(right.total(), wanted.total(), given.total())}
    return scores | {f"f1_{kind}": _f1(right[kind], wanted[kind], given[kind]) for kind in sorted(wanted)}


def _f1(right: int, wanted: int, given: int) -> float:
    return 2 * right / max(wanted + given, 1)


def _macro_f1(truth: np.ndarray, answers: np.ndarray) -> float:
    kinds = np.unique(truth)
    scores = [
        _f1(*(int(each.sum()) for each in ((truth == k) & (answers == k), truth == k, answers == k))) for k in kinds
    ]
    return float(np.mean(scores)) if scores else 0.0
