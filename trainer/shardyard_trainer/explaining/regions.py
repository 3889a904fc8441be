"""The shares of the regions of a picture, and which part of it the model sees.

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shardyard.v1 import explanation_pb2
from shardyard_trainer.inputs.image_settings import PictureSettings, box_seen

_MOST_SIDE = 32
"""Regions each way at most: more than people tell apart."""

_USUAL_SIDE = 14


def grey(settings: PictureSettings) -> torch.Tensor:
    """A picture of the middle grey, as the model reads it, fp32 [1, C, H, W]."""
    values = [(127.5 * settings.factor - mean) / std for mean, std in zip(settings.mean, settings.std, strict=True)]
    return torch.tensor(values, dtype=torch.float32)[None, :, None, None].expand(1, -1, *settings.seen).contiguous()


def shares_of_regions(
    shares_1HW: torch.Tensor, config: Any, settings: PictureSettings, size: tuple[int, int]
) -> explanation_pb2.Regions:
    """The shares of regions: the patches of a model that has them. `size` is width and height of the whole picture."""
    pixels_HW = shares_1HW[0].numpy()
    edges = [_edges(side, _patch(config, axis)) for axis, side in enumerate(pixels_HW.shape)]
    values = np.add.reduceat(np.add.reduceat(pixels_HW, edges[0], axis=0), edges[1], axis=1)
    left, top, right, bottom = box_seen(size, settings)
    return explanation_pb2.Regions(
        rows=len(edges[0]),
        columns=len(edges[1]),
        values=values.ravel().tolist(),
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        width=size[0],
        height=size[1],
    )


def _patch(config: Any, axis: int) -> int:
    """Pixels of a patch along an axis; 0 if the model has none."""
    given = getattr(config, "patch_size", None)
    if isinstance(given, list | tuple) and len(given) == 2:
        given = given[axis]
    return given if type(given) is int and given > 0 else 0


def _edges(side: int, patch: int) -> list[int]:
    """Where the regions begin along a side of so many pixels."""
    patches = side // patch if patch and side % patch == 0 else 0
    count = patches if 0 < patches <= _MOST_SIDE else min(_USUAL_SIDE, side)
    return [at * side // count for at in range(count)]
