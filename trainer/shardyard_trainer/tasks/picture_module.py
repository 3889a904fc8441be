"""The module that classifies pictures, its metrics, and a measure of its activation memory.

Shape suffixes: B pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shardyard_trainer.data.labels import MULTI_LABEL
from shardyard_trainer.models.loading import number_parameter
from shardyard_trainer.tasks import distances
from shardyard_trainer.tasks.metrics import ClassificationMetrics
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput, Scores

_TOP = 5


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of tensors that a forward pass keeps for the backward pass, parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        self.num_bytes = 0
        own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        seen = dict[int, torch.Tensor]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage()._cdata
            if place not in own and place not in seen:
                seen[place] = tensor
                self.num_bytes += tensor.untyped_storage().nbytes()
            return tensor

        super().__init__(keep, lambda tensor: tensor)


class PictureModule(HuggingFaceModule):
    """Classifies pictures; the loss is summed over them."""

    def __init__(self, model: Any, *, problem: int, label_smoothing: float, needs_two: bool) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        self._problem = problem
        self._label_smoothing = label_smoothing
        self._needs_two = needs_two

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_outputs: bool = False,
        return_scores: bool = False,
    ) -> ModuleOutput:
        """`labels`: classes [B], or 0 or 1 for each class [B, C]; without them the loss is 0."""
        pixel_values = pixel_values.to(number_parameter(self).dtype)
        if self.training and self._needs_two and len(pixel_values) == 1:
            logits_BC = self._alone(pixel_values)
        else:
            logits_BC = self.model(pixel_values=pixel_values).logits
        loss = logits_BC.new_zeros((), dtype=torch.float32) if labels is None else self._loss(logits_BC.float(), labels)
        distance = distances.of_several_classes if self._problem == MULTI_LABEL else distances.of_classes
        scores = Scores(logits_BC.float(), distance) if return_scores else None
        return ModuleOutput(loss, {"logits": logits_BC} if return_outputs else None, scores=scores)

    def _alone(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes a single picture with running statistics: its own could be of a single value a channel."""
        norms = [each for each in self.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        were = [norm.training for norm in norms]
        for norm in norms:
            norm.eval()
        try:
            return self.model(pixel_values=pixel_values).logits  # type: ignore[no-any-return]
        finally:
            for norm, was in zip(norms, were, strict=True):
                norm.train(was)

    def _loss(self, logits_BC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._problem == MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(logits_BC, labels.float(), reduction="none").mean(-1).sum()
        smoothing = self._label_smoothing if self.training else 0.0
        return F.cross_entropy(logits_BC, labels, reduction="sum", label_smoothing=smoothing)


class PictureMetrics(ClassificationMetrics):
    """The metrics of classification; with more than five classes also `accuracy_top5`."""

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        found = super().compute(parts)
        full = [part for part in parts if part[2] is not None]
        outputs, labels = np.concatenate([part[2] for part in full]), np.concatenate([part[3] for part in full])
        if labels.ndim == 1 and outputs.shape[1] > _TOP:
            best = np.argpartition(-outputs, _TOP - 1, axis=1)[:, :_TOP]
            found["accuracy_top5"] = float((best == labels[:, None]).any(1).mean())
        return found

    def directions(self) -> Mapping[str, int]:
        """Those of classification, and `accuracy_top5` if there is one."""
        has_top = self._schema.problem != MULTI_LABEL and self._schema.num_outputs > _TOP
        return {**super().directions(), **({"accuracy_top5": 1} if has_top else {})}
