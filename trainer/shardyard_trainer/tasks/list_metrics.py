"""MRR and NDCG at 10 of scored lists, beside those of a random order.

Equal scores count against the model: a passage is behind every other one of the same score that is less relevant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.relevance import RELEVANT, RelevanceSamples
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput

CUT = 10
"""The length of the list that the metrics look at."""


class ListMetrics(LossSum):
    """`loss`, `mrr_10` and `ndcg_10` over the queries whose passages have different labels, and `random_…`.

    NDCG takes the labels as gains. A query whose passages all have the same label has no order to be right about; if
    all queries are such, the numbers are 0.
    """

    def __init__(self, samples: RelevanceSamples) -> None:
        super().__init__()
        self._samples = samples
        self._scores: list[torch.Tensor] = []
        self._places: list[int] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._scores.append(output.outputs["logits"].detach().float().flatten())
        self._places += batch.samples

    def part(self) -> Any:
        """Sums of the loss and the pairs, the scores, and which samples they are of."""
        scores = torch.cat(self._scores).cpu().numpy() if self._scores else np.zeros(0, np.float32)
        return *super().part(), scores, np.asarray(self._places, np.int64)

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        scores, places = (np.concatenate([part[at] for part in parts]) for at in (2, 3))
        labels, queries = self._samples.labels[places], self._samples.queries[places]
        found = [
            (*_ranked(grades_L[np.lexsort((grades_L, -scores_L))]), *_at_random(grades_L))
            for scores_L, grades_L in _lists(scores, labels, queries)
        ]
        mrr, ndcg, random_mrr, random_ndcg = np.mean(found, axis=0).tolist() if found else (0.0,) * 4
        ours = {"loss": self.mean(parts), "mrr_10": mrr, "ndcg_10": ndcg}
        return {**ours, "random_mrr_10": random_mrr, "random_ndcg_10": random_ndcg}

    def directions(self) -> Mapping[str, int]:
        """The loss, and the metrics of lists."""
        return {**super().directions(), "mrr_10": 1, "ndcg_10": 1}


def _lists(scores: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and labels of each query that has passages to rank."""
    order = np.argsort(queries, kind="stable")
    ends = np.flatnonzero(np.diff(queries[order])) + 1
    for rows in np.split(order, ends):
        if (labels[rows] != labels[rows[0]]).any():
            yield scores[rows], labels[rows]


def _ranked(grades_L: np.ndarray) -> tuple[float, float]:
    """MRR and NDCG of a list in its order."""
    relevant = np.flatnonzero(grades_L[:CUT] >= RELEVANT)
    return 1 / (1 + int(relevant[0])) if len(relevant) else 0.0, _gain(grades_L) / _gain(np.sort(grades_L)[::-1])


def _gain(grades_L: np.ndarray) -> float:
    top = grades_L[:CUT]
    return float((top / np.log2(np.arange(2, len(top) + 2))).sum())


def _at_random(grades_L: np.ndarray) -> tuple[float, float]:
    """What both are for a random order, on average."""
    total, relevant = len(grades_L), int((grades_L >= RELEVANT).sum())
    mrr, none_yet = 0.0, 1.0
    for place in range(1, min(CUT, total) + 1):
        left = total - place + 1
        mrr += none_yet * min(relevant / left, 1) / place
        none_yet *= max(1 - relevant / left, 0)
    even = np.full(total, grades_L.mean())
    return mrr, _gain(even) / _gain(np.sort(grades_L)[::-1])
