"""Which samples of the training data are held out for evaluation, by lot."""

from __future__ import annotations

import numpy as np

from shardyard_trainer.data.errors import DataError

_SALT = 0x401D


def by_lot(num_samples: int, holdout: float, seed: int, *, what: str = "row") -> tuple[np.ndarray, np.ndarray]:
    """The samples to train on, and those to evaluate on, in the order drawn. Raises DataError if none is left to train.

    Held out at random, not from the end: labelled data often comes sorted by label. `what` is what a message calls one.
    """
    order = np.random.default_rng([seed, _SALT]).permutation(num_samples)
    held = round(num_samples * holdout) or int(holdout > 0)
    if num_samples - held < 1:
        raise DataError(f"{num_samples} {what}: nothing would be left to train on; give eval_data, or holdout 0")
    return order[held:], order[:held]


def split_by_lot(num_samples: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `by_lot`, each part in the order of the data."""
    train, held_out = by_lot(num_samples, holdout, seed)
    return np.sort(train), np.sort(held_out)
