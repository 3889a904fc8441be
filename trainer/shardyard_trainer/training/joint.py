"""Losses of the whole global batch: a sample's loss may depend on every other sample of the step.

First the outputs of all micro batches are computed and gathered over the ranks; the loss and its gradient are taken
with respect to these outputs; then each micro batch is computed again, and its part of that gradient goes back through
it (GradCache, Gao et al., 2021). So loss and gradients are those of one pass over the whole batch, whatever ranks and
micro batches it is dealt to. A rank with one micro batch computes it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.module import JointLoss, ModuleOutput
from shardyard_trainer.training.gang import Gang

Forward = Callable[[MicroBatch], ModuleOutput]


class Part(NamedTuple):
    """A micro batch on its device; `seed` is that of its dropout, the same in both passes."""

    batch: MicroBatch
    is_dummy: bool
    seed: int


def joint_losses(forward: Forward, loss_of: JointLoss, parts: Sequence[Part], gang: Gang) -> Iterator[torch.Tensor]:
    """The summed loss of each micro batch, with the gradient of the whole global batch. A collective.

    Every loss has to go backward before the next one is taken.
    """
    is_one = len(parts) == 1
    with torch.set_grad_enabled(is_one):
        first = [_vectors(forward, part) for part in parts]
    real = [at for at, part in enumerate(parts) if not part.is_dummy]
    own = torch.cat([first[0].detach()[:0], *(first[at].detach() for at in real)])
    keys = [parts[0].batch.inputs["keys"][:0], *(parts[at].batch.inputs["keys"] for at in real)]
    losses, gradient = _of_whole_batch(loss_of, own, torch.cat(keys), gang)
    start = 0
    for part, vectors in zip(parts, first, strict=True):
        again = vectors if is_one else _vectors(forward, part)
        if part.is_dummy:
            yield again.sum() * 0.0
            continue
        mine = slice(start, start + len(vectors))
        start = mine.stop
        towards = (again * gradient[mine]).sum()
        # The number is the loss; its gradient is that of `towards`.
        yield losses[mine].sum() + towards - towards.detach()


def _vectors(forward: Forward, part: Part) -> torch.Tensor:
    torch.manual_seed(part.seed)
    outputs = forward(part.batch).outputs
    assert outputs is not None
    return outputs["vectors"]


def _of_whole_batch(
    loss_of: JointLoss, own: torch.Tensor, keys: torch.Tensor, gang: Gang
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of this rank's samples, and the gradient of all ranks' losses with respect to its vectors."""
    every, every_keys = gang.gather_rows(own), gang.gather_rows(keys)
    start = sum(len(rows) for rows in every[: gang.rank])
    mine = slice(start, start + len(own))
    vectors = torch.cat(every).requires_grad_()
    with torch.enable_grad():
        losses = loss_of(vectors, torch.cat(every_keys), mine)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    gradient = torch.zeros_like(vectors) if vectors.grad is None else vectors.grad
    return losses.detach(), gang.sum_tensor(gradient)[mine]
