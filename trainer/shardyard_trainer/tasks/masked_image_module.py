"""The module that fills in the masked parts of pictures, and its metrics.

Shape suffixes: B pictures, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput


class MaskedImageModule(HuggingFaceModule):
    """Predicts masked pixels; the loss is summed over pictures, each the mean error of a masked value."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.own_head = None

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor, return_outputs: bool = False) -> ModuleOutput:
        """`mask` [B, places, places]: True is masked."""
        pixels_BCHW = pixel_values.to(next(self.parameters()).dtype)
        made_BCHW = self.model(pixel_values=pixels_BCHW, bool_masked_pos=mask.flatten(1)).reconstruction
        # The probe reports shapes that do not match; here the mask is scaled to the pixels.
        times = pixel_values.shape[-1] // mask.shape[-1]
        mask_B1HW = mask.repeat_interleave(times, 1).repeat_interleave(times, 2).unsqueeze(1)
        target_BCHW = pixel_values.float()
        loss = _masked_error(made_BCHW.float(), target_BCHW, mask_B1HW).sum()
        if not return_outputs:
            return ModuleOutput(loss, None)
        seen_B1HW = ~mask_B1HW
        means_BC11 = (target_BCHW * seen_B1HW).sum((2, 3), keepdim=True) / seen_B1HW.sum((2, 3), keepdim=True)
        plain = _masked_error(means_BC11.expand_as(target_BCHW), target_BCHW, mask_B1HW).sum()
        return ModuleOutput(loss, {"reconstruction": made_BCHW, "one_colour": plain})


def _masked_error(made_BCHW: torch.Tensor, target_BCHW: torch.Tensor, mask_B1HW: torch.Tensor) -> torch.Tensor:
    """The mean absolute error of a masked value of each picture [B]."""
    errors_BCHW = (made_BCHW - target_BCHW).abs() * mask_B1HW
    return errors_BCHW.sum((1, 2, 3)) / (mask_B1HW.sum((1, 2, 3)) * target_BCHW.shape[1])


class MaskedImageMetrics(LossSum):
    """`loss` (mean absolute error of a masked value), and `one_colour_loss`: that of each picture's visible mean."""

    def __init__(self) -> None:
        super().__init__()
        self._plain: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._plain.append(output.outputs["one_colour"].detach().double())

    def part(self) -> Any:
        """Sums of the loss, of pictures, and of the error of one colour."""
        return *super().part(), float(torch.stack(self._plain).sum()) if self._plain else 0.0

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        pictures = max(1, sum(part[1] for part in parts))
        return {"loss": self.mean(parts), "one_colour_loss": float(sum(part[2] for part in parts) / pictures)}
