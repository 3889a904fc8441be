"""Pictures: from the bytes of a file to what a model reads, by the same code in training and in answering.

Shape suffixes: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image

from shardyard_trainer.data.pictures import PictureInvalid, from_array, read_picture
from shardyard_trainer.inputs.image_settings import FILE, PictureSettings, normalised, processed, read_settings
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import Folder
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.models.loading import number_parameter

PATCH = 16
"""Pixels each way that count as one position, when batches and memory are reckoned."""

_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """Random changes in training: the smallest share of a picture that a crop keeps, and how often it is mirrored."""

    crop_scale: float = 1.0
    flip: float = 0.0


@dataclass(frozen=True)
class EncodedPicture:
    """One picture as numbers, fp32 [C, H, W]; `complaint` says why it could not be decoded."""

    pixels: np.ndarray
    complaint: str = ""

    @property
    def num_positions(self) -> int:
        """Positions of the picture, by its height and width."""
        return positions(self.pixels.shape[1:])


@dataclass(frozen=True)
class ImageInputs:
    """How pictures are prepared for a model of this folder."""

    settings: PictureSettings
    files: ClassVar[tuple[str, ...]] = (FILE,)

    @classmethod
    def load(cls, source: Folder, described: ModelFolder) -> Self:
        """Reads the settings of a model folder. Raises FolderInvalid."""
        what = "it says how pictures are resized and normalised: save the image processor beside the model"
        values = source.read_object(FILE, what=what)
        channels = described.config.get("num_channels", 3)
        return cls(read_settings(values, channels=channels if channels in (1, 3) else 3))

    @staticmethod
    def refusal(config: Any) -> str:
        """Why a model of this configuration cannot read pictures; empty if it can."""
        return architectures.picture_refusal(config)

    def save(self, folder: Path, _config: Any) -> None:
        """Writes the settings as preprocessor_config.json."""
        text = json.dumps(self.settings.to_dict(), indent=2, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    def generation(self, _config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings unchanged: a picture model does not generate."""
        return dict(settings)

    def read(self, content: bytes | np.ndarray) -> Image.Image:
        """Decodes a picture to the model's channels. Raises PictureInvalid."""
        channels = self.settings.channels
        return (
            read_picture(content, channels=channels)
            if isinstance(content, bytes)
            else from_array(content, channels=channels)
        )

    def encode(self, content: bytes | np.ndarray) -> np.ndarray:
        """A picture as numbers, as in evaluation and answers. Raises PictureInvalid."""
        return processed(self.read(content), self.settings)

    def encode_or_say(self, content: bytes) -> EncodedPicture:
        """The same, with a complaint in place of an error."""
        try:
            return EncodedPicture(self.encode(content))
        except PictureInvalid as error:
            return EncodedPicture(np.zeros((1, 1, 1), np.float32), str(error))

    def augment(self, content: bytes | np.ndarray, how: Augmentation, draw: np.random.Generator) -> np.ndarray:
        """A picture as numbers, with random changes drawn from `draw`. Raises PictureInvalid."""
        picture = self.read(content)
        if how.crop_scale < 1:
            box = random_box(picture.size, how.crop_scale, draw)
            height, width = self.settings.seen
            resample = Image.Resampling(self.settings.resample)
            pixels = normalised(picture.resize((width, height), resample, box=box), self.settings)
        else:
            pixels = processed(picture, self.settings)
        return np.ascontiguousarray(pixels[..., ::-1]) if draw.random() < how.flip else pixels

    def tensors(self, model: Any, encoded: Sequence[EncodedPicture]) -> dict[str, torch.Tensor]:
        """The inputs of a model: `pixel_values` [B, C, H, W]."""
        parameter = number_parameter(model)
        pixels = torch.from_numpy(np.stack([each.pixels for each in encoded]))
        return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}


def complaints(encoded: Sequence[EncodedPicture]) -> list[tuple[str, str]]:
    """(field, message) of each instance of a request whose bytes are not a picture."""
    return [(f"instances[{index}].image", each.complaint) for index, each in enumerate(encoded) if each.complaint]


def positions(side: Sequence[int]) -> int:
    """The number of positions for a picture of this height and width."""
    return math.ceil(side[0] / PATCH) * math.ceil(side[1] / PATCH) + 1


def random_box(size: tuple[int, int], scale: float, draw: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part of a picture: `scale` to all of its area, sides 3:4 to 4:3 (Szegedy et al., 2015).

    (left, top, right, bottom). A picture that has no such part gives its middle.
    """
    width, height = size
    for _ in range(_TRIES):
        area = width * height * draw.uniform(scale, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(draw.integers(0, width - wide + 1)), int(draw.integers(0, height - high + 1))
            return left, top, left + wide, top + high
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    wide, high = max(min(width, round(height * ratio)), 1), max(min(height, round(width / ratio)), 1)
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
