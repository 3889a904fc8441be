"""Weights of classes in the training loss: given in the spec, or balanced by their frequency in the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shardyard_trainer.data.errors import SpecError, listed, nearest, shorten
from shardyard_trainer.tasks.ingredients import Ingredients


def find_weights(job: Ingredients, labels: Sequence[str], count: Callable[[], np.ndarray]) -> np.ndarray | None:
    """The weight of each class, float32 [C]; None: all are equal. Raises SpecError for an unknown label.

    `count` returns how often each class is trained on. With `balanced` a class weighs total / (classes · its count), as
    in scikit-learn, and a class that does not occur weighs 1.
    """
    wanted = job.wanted.class_weights
    if not job.wanted.HasField("class_weights"):
        return None
    weights = np.ones(len(labels), np.float32)
    if wanted.balanced:
        counts = count()
        seen = counts > 0
        weights[seen] = counts.sum() / (seen.sum() * counts[seen])
    for label, weight in sorted(wanted.weights.items()):
        if label not in labels:
            message = f"no label {shorten(label)!r}; there are: {listed(labels)}{nearest(label, labels)}"
            raise SpecError(f"{job.field}.class_weights.weights", "SPEC_INVALID", message)
        weights[labels.index(label)] = weight
    return weights


def as_tensor(weights: np.ndarray | None, like: torch.Tensor) -> torch.Tensor | None:
    """The weights as fp32 on the device of `like`; None without weights."""
    # Not a buffer: an engine that trains in bf16 would round it, and the loss would be divided by another sum.
    return None if weights is None else torch.from_numpy(weights).to(like.device)
