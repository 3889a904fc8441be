"""Vectors that are trained: the module, and the loss of pairs among all texts of a batch.

Shape suffixes: B samples, K texts of a sample, T positions, D width, R samples looked at, M candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shardyard_trainer.inputs.sentences import ABSENT
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput
from shardyard_trainer.tasks.vectors import pool

VECTORS = "sentence_embedding"
"""The name of the vectors in a graph, as other libraries have it."""

_ROWS = 256
"""Anchors compared at once, so that a large batch does not need all of its cosines in memory."""


class TextEmbedder(HuggingFaceModule):
    """Makes a vector of length 1 of each text; the loss is summed over samples.

    `learns_pairs`: it is trained on pairs without scores, whose loss is that of the whole global batch.
    """

    own_head = None

    def __init__(self, model: Any, *, pooling: str, temperature: float, learns_pairs: bool) -> None:
        super().__init__()
        self.model = model
        self._pooling = pooling
        self._makes_vectors = False
        self._pair_loss = PairLoss(temperature)
        self.joint = self._pair_loss if learns_pairs else None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        keys: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        cosines: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        """`input_ids` [B · K, T]; `keys` [B, K], the same for the same texts; `cosines` [B], what pairs are to have.

        The outputs are `vectors` [B, K, D]. Without cosines, the loss is that of these samples alone.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        vectors_BKD = self._vectors(inputs).view(*keys.shape, -1)
        if cosines is not None:
            found_B = (vectors_BKD[:, 0] * vectors_BKD[:, 1]).sum(-1)
            loss = F.mse_loss(found_B, cosines.float(), reduction="sum")
        else:
            loss = self._pair_loss(vectors_BKD, keys, slice(0, len(keys))).sum()
        return ModuleOutput(loss, {"vectors": vectors_BKD} if return_outputs else None)

    def network(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The vectors [N, D], of length 1."""
        return {VECTORS: self._vectors(inputs)}

    def answer_by(self, model: nn.Module) -> None:
        """Takes the vectors of another network as they are."""
        self.model, self._makes_vectors = model, True

    def _vectors(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self._makes_vectors:
            made: torch.Tensor = getattr(self.model(**inputs), VECTORS)
            return made
        hidden_NTD = self.backbone(**inputs).last_hidden_state
        return F.normalize(pool(hidden_NTD, inputs["attention_mask"], self._pooling).float(), dim=-1)


@dataclass(frozen=True)
class PairLoss:
    """Cross-entropy of finding each anchor's positive among all texts of a batch that are not anchors."""

    temperature: float

    def __call__(self, vectors: torch.Tensor, keys: torch.Tensor, own: slice) -> torch.Tensor:
        """The losses of `own` samples of a batch with these vectors [B, K, D] and keys [B, K]."""
        # Of no samples, with a gradient: a rank without samples takes part.
        losses = [vectors.flatten()[:0]]
        for rows in _parts(own):
            logits_RM = masked_cosines(vectors, keys, rows) / self.temperature
            places_R = torch.arange(rows.start, rows.stop, device=vectors.device)
            losses.append(F.cross_entropy(logits_RM, places_R, reduction="none"))
        return torch.cat(losses)


def own_ranks(vectors: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The place of each anchor's positive among all candidates, from 1: after those with the same cosine, or NaN.

    A text that is a candidate several times counts once.
    """
    ranks, is_copy_M = [torch.zeros(0, dtype=torch.int64)], _are_copies(keys[:, 1:].T.reshape(-1))
    for rows in _parts(slice(0, len(keys))):
        cosines_RM = masked_cosines(vectors, keys, rows)
        own_R1 = torch.arange(rows.start, rows.stop)[:, None]
        before_RM = ~(cosines_RM < cosines_RM.gather(1, own_R1)) & ~is_copy_M
        ranks.append(before_RM.scatter(1, own_R1, True).sum(1))
    return torch.cat(ranks)


def _are_copies(keys_M: torch.Tensor) -> torch.Tensor:
    """Whether an earlier candidate has the same key, bool [M]."""
    texts_M = torch.unique(keys_M, return_inverse=True)[1]
    places_M = torch.arange(len(keys_M))
    firsts = torch.full_like(keys_M, len(keys_M)).scatter_reduce(0, texts_M, places_M, "amin")
    return firsts[texts_M] != places_M


def masked_cosines(vectors_BKD: torch.Tensor, keys_BK: torch.Tensor, rows: slice) -> torch.Tensor:
    """The cosines [R, M] of some anchors with all positives, then all negatives; sample b's positive is candidate b.

    Candidates that are not wrong for an anchor are -inf: the anchor's own text, other texts that the batch has as a
    positive of the same anchor, and negatives that are not there.
    """
    candidates_MD = vectors_BKD[:, 1:].transpose(0, 1).flatten(0, 1)
    cosines_RM = vectors_BKD[rows, 0] @ candidates_MD.T
    return cosines_RM.masked_fill(_do_not_count(keys_BK, rows), -torch.inf)


def _do_not_count(keys_BK: torch.Tensor, rows: slice) -> torch.Tensor:
    """Whether a candidate is not a wrong answer: a right one of the anchor, or not there, bool [R, M]."""
    # Numbers of texts, small enough that a pair of them is one number.
    texts_BK = torch.unique(keys_BK, return_inverse=True)[1]
    number = int(texts_BK.max()) + 1
    anchors_B = texts_BK[:, 0]
    right = torch.cat([anchors_B * number + texts_BK[:, 1], anchors_B * number + anchors_B])
    pairs_RM = anchors_B[rows, None] * number + texts_BK[:, 1:].T.reshape(1, -1)
    found_RM = torch.isin(pairs_RM, right) | (keys_BK[:, 1:].T.reshape(1, -1) == ABSENT)
    places_R = torch.arange(len(found_RM), device=keys_BK.device)
    found_RM[places_R, places_R + rows.start] = False
    return found_RM


def _parts(rows: slice) -> list[slice]:
    return [slice(start, min(start + _ROWS, rows.stop)) for start in range(rows.start, rows.stop, _ROWS)]
