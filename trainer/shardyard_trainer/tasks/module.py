"""The module of a task: what the engine trains, and what it returns.

Shape suffixes: B samples, D width, N units that the loss is over, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import nn

from shardyard_trainer.models import architectures


class JointLoss(Protocol):
    """A loss in which a sample depends on all others of the global batch."""

    def __call__(self, vectors: torch.Tensor, keys: torch.Tensor, own: slice) -> torch.Tensor:
        """The losses of `own` samples, fp32 [own], from the module's output `vectors` and the input `keys` of all."""


class TaskModule(nn.Module):
    """Model and head in one module, so that the engine's hooks see every parameter.

    `forward(**inputs)` returns a `ModuleOutput`: the loss summed (not averaged) over the batch's units, in fp32, and
    the head's raw outputs if they are asked for with `return_outputs=True` (evaluation, prediction), else None. Modules
    of tasks that are `Teachable` also take `return_scores=True`, as student and as teacher.
    """

    backbone: nn.Module
    joint: JointLoss | None = None
    """The loss that is trained, if a sample's depends on the others of the global batch; None: that of `forward`."""


class HuggingFaceModule(TaskModule):
    """A module around a transformers model.

    `model` is what `save_pretrained` writes; `own_head` is what goes into `head.safetensors` beside it, None if the
    model has its head inside.
    """

    model: Any
    own_head: nn.Linear | None
    _held: Sequence[nn.Module] = ()

    def hold(self, parts: Sequence[nn.Module]) -> None:
        """Keeps parts in evaluation mode while the others are trained: no dropout, and fixed running statistics."""
        # As a tuple: modules in it are not registered a second time.
        self._held = tuple(parts)

    def train(self, mode: bool = True) -> Self:
        """Like every module, except that held parts stay in evaluation mode."""
        super().train(mode)
        for part in self._held:
            part.eval()
        return self

    def network(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs of the task's `Graph` by their names, from the model's own inputs."""
        return {"logits": self.model(**inputs).logits}

    def answer_by(self, model: nn.Module) -> None:
        """Computes with another network from now on: what `model(**inputs)` returns has the `Graph`'s outputs."""
        self.model = model

    # As an attribute, the backbone's parameters would be registered under a second name.
    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The part of the model that returns `last_hidden_state`."""
        return architectures.backbone_of(self.model)  # type: ignore[no-any-return]


Distance = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""How far a student's outputs [N, C] are from a teacher's at a temperature, [N] (`distances`)."""


class Scores(NamedTuple):
    """The outputs [N, C], fp32, of the units that the loss is over, in their order, and how a teacher's are compared.

    `weights` [N] is how much each unit counts; None: all count 1.
    """

    logits: torch.Tensor
    distance: Distance
    weights: torch.Tensor | None = None


class ModuleOutput(NamedTuple):
    """The summed loss (a scalar, fp32), the head's outputs or statistics for the metrics, and what was written.

    `scores` are there if they were asked for.
    """

    loss_sum: torch.Tensor
    outputs: dict[str, torch.Tensor] | None
    sequences: Sequence[Sequence[int]] | None = None
    scores: Scores | None = None
