"""Metrics shared by several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelSchema
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.base import TaskWarning, WriteBatch
from shardyard_trainer.tasks.module import ModuleOutput


class LossSum:
    """Adds up the loss and its units."""

    write: WriteBatch | None = None

    def __init__(self) -> None:
        self._loss: list[torch.Tensor] = []
        self._units = 0.0

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        # Kept on the device: reading it would wait for the batch.
        self._loss.append(output.loss_sum.detach().double())
        self._units += batch.num_units

    def part(self) -> Any:
        """Sum of the loss, and of the units."""
        return float(torch.stack(self._loss).sum()) if self._loss else 0.0, self._units

    def directions(self) -> Mapping[str, int]:
        """The loss, the lower the better."""
        return {"loss": -1}

    @staticmethod
    def mean(parts: Sequence[Any]) -> float:
        """The mean loss of a unit over all ranks."""
        return float(sum(part[0] for part in parts) / max(1, sum(part[1] for part in parts)))


class ClassificationMetrics(LossSum):
    """`loss`, and by problem: `accuracy`, `f1_macro`, `mcc`; `f1_micro`, `f1_macro`; `pearson`, `spearman`, `mse`."""

    def __init__(self, schema: LabelSchema) -> None:
        super().__init__()
        self._schema = schema
        self._outputs: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._outputs.append(output.outputs["logits"].detach().float())
        self._labels.append(batch.inputs["labels"])

    def part(self) -> Any:
        """Sums of loss and texts, the outputs [texts, C] and the labels."""
        outputs = torch.cat(self._outputs).cpu().numpy() if self._outputs else None
        labels = torch.cat(self._labels).cpu().numpy() if self._labels else None
        return *super().part(), outputs, labels

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        full = [part for part in parts if part[2] is not None]
        outputs = np.concatenate([part[2] for part in full])
        labels = np.concatenate([part[3] for part in full])
        measure = {REGRESSION: _regression, MULTI_LABEL: _multi_label, SINGLE_LABEL: _single_label}
        return {"loss": self.mean(parts), **measure[self._schema.problem](outputs, labels)}

    def directions(self) -> Mapping[str, int]:
        """By problem."""
        names = {
            REGRESSION: {"pearson": 1, "spearman": 1, "mse": -1},
            MULTI_LABEL: {"f1_micro": 1, "f1_macro": 1},
            SINGLE_LABEL: {"accuracy": 1, "f1_macro": 1, "mcc": 1},
        }
        return {**super().directions(), **names[self._schema.problem]}


def _single_label(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # Imported here: it takes half a second, which only evaluations should pay.

    predicted = outputs.argmax(-1)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(labels, predicted)),
    }


def _multi_label(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    # A logit over 0 is a probability over one half. F1 is computed over the labels in the data, whatever their number:
    # scikit-learn reads a single column as two classes, and its micro average is then the accuracy.
    predicted, truth = outputs > 0, labels > 0.5
    right, wrong = (predicted & truth).sum(0), (predicted ^ truth).sum(0)
    return {
        "f1_micro": float(_f1(right.sum(), wrong.sum())),
        "f1_macro": float(np.mean(_f1(right, wrong))),
    }


def _f1(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN), from TP and FP + FN; 0 for a label that neither data nor model ever says."""
    return np.asarray(2 * right / np.maximum(2 * right + wrong, 1))


def _regression(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return correlations(outputs[:, 0], labels)


def correlations(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`pearson`, `spearman` and `mse` of numbers."""
    from scipy import stats

    # A constant has no correlation: report 0, because a NaN would make every comparison false.
    has_spread = len(labels) > 1 and np.ptp(predicted) > 0 and np.ptp(labels) > 0
    return {
        "pearson": float(stats.pearsonr(predicted, labels).statistic) if has_spread else 0.0,
        "spearman": float(stats.spearmanr(predicted, labels).statistic) if has_spread else 0.0,
        "mse": float(np.mean((predicted - labels) ** 2)),
    }


def one_answer(metrics: Mapping[str, float]) -> TaskWarning | None:
    """A warning if Matthews' correlation shows that all answers are the same; None if not, or if there is none."""
    if metrics.get("mcc") != 0:
        return None
    message = "mcc is 0: the answers are unrelated to the labels, as if all answers, or all labels, were the same"
    return TaskWarning("ONE_ANSWER", f"{message}; more epochs or a higher learning_rate may help")
