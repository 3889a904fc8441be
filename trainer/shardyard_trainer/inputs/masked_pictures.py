"""Pictures with parts of them masked at random, by (seed, data epoch, sample) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from shardyard_trainer.inputs.base import MicroBatch, SampleRef, seed_for
from shardyard_trainer.inputs.image import Augmentation, ImageInputs
from shardyard_trainer.inputs.pictures import Pictures, PictureSamples


class Masks(NamedTuple):
    """How pictures are masked: squares of `pixels`, that share of them; `patch` pixels are one place of the model.

    `side` is the height and width of a picture; all in pixels, each a multiple of the one before.
    """

    patch: int
    pixels: int
    side: int
    ratio: float

    @property
    def places(self) -> int:
        """Places of the model each way."""
        return self.side // self.patch

    def draw(self, draw: np.random.Generator) -> np.ndarray:
        """Which places are masked, bool [places, places]: at least one square, and never all."""
        squares = self.side // self.pixels
        count = min(max(math.ceil(squares * squares * self.ratio), 1), squares * squares - 1)
        mask = np.zeros(squares * squares, bool)
        mask[draw.permutation(squares * squares)[:count]] = True
        times = self.pixels // self.patch
        return mask.reshape(squares, squares).repeat(times, 0).repeat(times, 1)


class MaskedPictureSamples(PictureSamples):
    """Pictures with `mask` [B, places, places]: True is masked."""

    def __init__(
        self,
        pictures: Pictures,
        index: np.ndarray,
        inputs: ImageInputs,
        masks: Masks,
        *,
        augmentation: Augmentation | None,
        seed: int,
    ) -> None:
        super().__init__(pictures, index, inputs, augmentation=augmentation, seed=seed)
        self._masks = masks

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`pixel_values` [B, C, H, W] and `mask`."""
        masks = [self._masks.draw(self._draw(sample)) for sample in samples]
        return self.batch(samples, {"mask": torch.from_numpy(np.stack(masks))})

    def _draw(self, sample: SampleRef) -> np.random.Generator:
        return np.random.default_rng(seed_for(self._seed, "mask", sample.data_epoch, self.row(sample)))
