"""Vectors of texts learnt the way sentence-transformers does it, in plain transformers: nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, mse_loss, normalize
from transformers import AutoModel, AutoTokenizer

from helpers.plain_loop import fit

Row = tuple[str, str, float | None]
"""Two texts, and the cosine that they are to have; None: they belong together."""


class Embedder:
    """A BERT with mean pooling and vectors of length 1, and its training."""

    def __init__(self, model: Path, length: int, seed: int) -> None:
        torch.manual_seed(seed)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._net = AutoModel.from_pretrained(model, dtype=torch.float32)
        self._length = length
        self._seed = seed

    def train(self, rows: Sequence[Row], *, epochs: int, learning_rate: float, batch: int) -> None:
        """On two texts with their cosine, or on pairs: then the positives of a batch are one another's negatives."""

        def loss_of(some: list[Row]) -> torch.Tensor:
            ones, others = (self._vectors([row[side] for row in some]) for side in (0, 1))
            if some[0][2] is not None:
                return mse_loss((ones * others).sum(-1), torch.tensor([row[2] for row in some]))
            return cross_entropy(20 * ones @ others.T, torch.arange(len(some)))

        fit(self._net, rows, loss_of, epochs=epochs, learning_rate=learning_rate, batch=batch, seed=self._seed)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The vectors of texts, in their order."""
        self._net.eval()
        return torch.cat([self._vectors(texts[at : at + 64]) for at in range(0, len(texts), 64)])

    def _vectors(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        mask = inputs["attention_mask"].unsqueeze(-1)
        return normalize((self._net(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
