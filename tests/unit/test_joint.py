"""Losses of the whole global batch: the gradient of one pass over all samples, dropout included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.tasks.embedder import PairLoss
from shardyard_trainer.tasks.module import ModuleOutput
from shardyard_trainer.training.gang import Gang
from shardyard_trainer.training.joint import Part, joint_losses

LOSS = PairLoss(0.1)
ALONE = Gang(rank=0, world_size=1, device=torch.device("cpu"))


class Tiny(nn.Module):
    """Vectors of pairs, by a layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.passes = 0

    def vectors(self, batch: MicroBatch) -> ModuleOutput:
        self.passes += 1
        made = nn.functional.normalize(self.layers(batch.inputs["numbers"]), dim=-1)
        return ModuleOutput(torch.zeros(()), {"vectors": made})

    def gradients(self) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters() if parameter.grad is not None])


def parts_of(sizes: Sequence[int], dummies: int = 0) -> list[Part]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for at, size in enumerate([*sizes, *[1] * dummies]):
        inputs = {
            "numbers": torch.randn(size, 2, 6, generator=generator),
            "keys": torch.randint(0, 30, (size, 2), generator=generator),
        }
        found.append(Part(MicroBatch(inputs, size, size, size), at >= len(sizes), seed=100 + at))
    return found


@pytest.mark.parametrize(("sizes", "dummies"), [([9], 0), ([3, 2, 4], 0), ([1] * 9, 0), ([5, 4], 2)])
def test_losses_and_gradient_are_those_of_one_pass_over_all_samples(sizes: list[int], dummies: int) -> None:
    parts, ours, whole = parts_of(sizes, dummies), Tiny(), Tiny()
    losses = []
    for loss in joint_losses(ours.vectors, LOSS, parts, ALONE):
        loss.backward()
        losses.append(loss.item())
    vectors = []
    for part in parts[: len(sizes)]:
        torch.manual_seed(part.seed)
        vectors.append((whole.vectors(part.batch).outputs or {})["vectors"])
    keys = torch.cat([part.batch.inputs["keys"] for part in parts[: len(sizes)]])
    every = LOSS(torch.cat(vectors), keys, slice(0, sum(sizes)))
    every.sum().backward()
    assert losses == pytest.approx([*(part.sum().item() for part in every.split(sizes)), *[0.0] * dummies], rel=1e-5)
    assert torch.allclose(ours.gradients(), whole.gradients(), rtol=1e-4, atol=1e-6)
    # Two passes, the first without a gradient; one if there is one micro batch.
    assert ours.passes == (1 if len(parts) == 1 else 2 * len(parts))


def test_a_rank_that_has_dummies_alone_takes_part_and_learns_nothing() -> None:
    tiny = Tiny()
    for loss in joint_losses(tiny.vectors, LOSS, parts_of([], 2), ALONE):
        loss.backward()
        assert loss.item() == 0
    assert not tiny.gradients().any()
