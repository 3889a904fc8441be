"""A cross-encoder the way sentence-transformers trains one, in plain transformers, and rankings: nothing of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.plain_loop import fit

Pair = tuple[str, str, float]
"""A query, a passage, and 1 if it is relevant, else 0."""


class CrossEncoder:
    """A BERT with one output for a query and a passage, and its training."""

    def __init__(self, model: Path, length: int, seed: int) -> None:
        torch.manual_seed(seed)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._net = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        self._length = length
        self._seed = seed

    def train(self, pairs: Sequence[Pair], *, epochs: int, learning_rate: float, batch: int) -> None:
        """By binary cross-entropy."""

        def loss_of(some: list[Pair]) -> torch.Tensor:
            return binary_cross_entropy_with_logits(self._scores(some), torch.tensor([pair[2] for pair in some]))

        fit(self._net, pairs, loss_of, epochs=epochs, learning_rate=learning_rate, batch=batch, seed=self._seed)

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """How relevant each passage is, in the order of the pairs."""
        self._net.eval()
        # Of similar lengths, so that little is padding.
        order = sorted(range(len(pairs)), key=lambda at: len(pairs[at][0]) + len(pairs[at][1]))
        found = [0.0] * len(pairs)
        for start in range(0, len(order), 64):
            some = order[start : start + 64]
            for at, score in zip(some, self._scores([pairs[at] for at in some]).tolist(), strict=True):
                found[at] = score
        return found

    def _scores(self, pairs: Sequence[Pair]) -> torch.Tensor:
        queries, passages = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        inputs = self._tokenizer(
            queries, passages, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        scores: torch.Tensor = self._net(**inputs).logits.flatten()
        return scores


def shared_words(pairs: Sequence[Pair]) -> list[float]:
    """The share of each query's words that the passage has."""
    return [
        len(words & set(re.findall(r"\w+", passage.lower()))) / len(words)
        for query, passage, _ in pairs
        if (words := set(re.findall(r"\w+", query.lower())))
    ]


def mrr(pairs: Sequence[Pair], scores: Sequence[float]) -> float:
    """The mean over the queries of 1 ÷ the place of the one relevant passage, behind others of the same score."""
    by_query: dict[str, list[tuple[float, float]]] = {}
    for (query, _, relevant), score in zip(pairs, scores, strict=True):
        by_query.setdefault(query, []).append((score, relevant))
    places = [
        sum(score >= own for score, _ in each) for each in by_query.values() for own, relevant in each if relevant
    ]
    return sum(1 / place for place in places) / len(places)
