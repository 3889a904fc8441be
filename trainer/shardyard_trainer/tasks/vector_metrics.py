"""Metrics of vectors of texts: how well positives are found, or how cosines go with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.embedder import PairLoss, own_ranks
from shardyard_trainer.tasks.metrics import LossSum, correlations
from shardyard_trainer.tasks.module import ModuleOutput

SEARCHED_AT_ONCE = 10_000
"""Pairs of the evaluation data among which positives are looked for; more are taken in stretches of as many."""


class ScoreMetrics(LossSum):
    """`loss`, `pearson`, `spearman` and `mse` of the cosines of scored pairs."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[torch.Tensor] = []
        self._wanted: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        vectors = (output.outputs or {})["vectors"].detach()
        self._found.append((vectors[:, 0] * vectors[:, 1]).sum(-1))
        self._wanted.append(batch.inputs["cosines"])

    def part(self) -> Any:
        """Sums of loss and pairs, the cosines and those wanted."""
        both = [torch.cat(some).cpu().numpy() if some else np.zeros(0) for some in (self._found, self._wanted)]
        return *super().part(), *both

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        found, wanted = (np.concatenate([part[at] for part in parts]) for at in (2, 3))
        return {"loss": self.mean(parts), **correlations(found, wanted)}

    def directions(self) -> Mapping[str, int]:
        """Correlations, the more the better."""
        return {"loss": -1, "pearson": 1, "spearman": 1, "mse": -1}


class PairMetrics(LossSum):
    """`loss`, `recall_1` and `mrr` of finding each anchor's positive among the texts of all evaluated pairs."""

    def __init__(self, loss: PairLoss) -> None:
        super().__init__()
        self._pair_loss = loss
        self._vectors: list[torch.Tensor] = []
        self._keys: list[torch.Tensor] = []
        self._samples: list[int] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch; its own loss does not count, which depends on who is in it."""
        self._vectors.append((output.outputs or {})["vectors"].detach())
        self._keys.append(batch.inputs["keys"])
        self._samples += batch.samples

    def part(self) -> Any:
        """The samples, their vectors and keys; None if there are none."""
        if not self._samples:
            return None
        return np.asarray(self._samples), *(torch.cat(some).cpu().numpy() for some in (self._vectors, self._keys))

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts, in the order of the data: they depend on no rank and no micro batch."""
        samples, vectors, keys = (np.concatenate([part[at] for part in parts if part]) for at in range(3))
        order = np.argsort(samples, kind="stable")
        losses, ranks = [], []
        for start in range(0, len(order), SEARCHED_AT_ONCE):
            some = order[start : start + SEARCHED_AT_ONCE]
            vectors_BKD, keys_BK = torch.from_numpy(vectors[some]), torch.from_numpy(keys[some])
            losses.append(self._pair_loss(vectors_BKD, keys_BK, slice(0, len(some))))
            ranks.append(own_ranks(vectors_BKD, keys_BK))
        found = torch.cat(ranks).double()
        return {
            "loss": float(torch.cat(losses).double().mean()),
            "recall_1": float((found == 1).double().mean()),
            "mrr": float(found.reciprocal().mean()),
        }

    def directions(self) -> Mapping[str, int]:
        """Positives found, the more the better."""
        return {"loss": -1, "recall_1": 1, "mrr": 1}
