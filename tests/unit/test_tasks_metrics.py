"""The metrics of a classifier against scikit-learn's, and the cases in which scikit-learn means something else."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from shardyard_trainer.data.labels import MULTI_LABEL, LabelSchema
from shardyard_trainer.tasks.metrics import ClassificationMetrics


def measured(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    names = tuple(f"label {i}" for i in range(labels.shape[1]))
    part = (0.0, len(labels), outputs.astype(np.float32), labels.astype(np.float32))
    return ClassificationMetrics(LabelSchema(MULTI_LABEL, names)).compute([part])


@pytest.mark.parametrize("num_labels", [2, 3, 17])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
def test_f1_of_several_labels_is_that_of_scikit_learn(num_labels: int, rate: float) -> None:
    random = np.random.default_rng(num_labels)
    truth = (random.random((50, num_labels)) < rate).astype(int)
    outputs = random.normal(size=truth.shape)
    found = measured(outputs, truth)
    for average in ("micro", "macro"):
        expected = reference.f1_score(truth, (outputs > 0).astype(int), average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)


def test_of_one_label_it_is_the_f1_of_that_label_and_not_the_accuracy() -> None:
    truth = (np.arange(200) % 20 == 0).astype(int)[:, None]
    never, always = np.full((200, 1), -3.0), np.full((200, 1), 3.0)
    assert measured(never, truth) == {"loss": 0.0, "f1_micro": 0.0, "f1_macro": 0.0}
    expected = reference.f1_score(truth[:, 0], np.ones(200, int))
    assert measured(always, truth) == {
        "loss": 0.0,
        "f1_micro": pytest.approx(expected),
        "f1_macro": pytest.approx(expected),
    }
    assert measured(truth * 2.0 - 1, truth)["f1_micro"] == 1.0
