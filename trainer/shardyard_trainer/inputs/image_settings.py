"""How a picture is prepared for a model, as plain numbers, read from and written to preprocessor_config.json.

Transformers has a class for each family, with rules of its own. Those that are known here are put into one form
(`PictureSettings`), which is written as the plain ViTImageProcessor: any version of transformers then does the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import FolderInvalid

FILE = "preprocessor_config.json"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LARGEST_SIDE = 4096
_SHORTEST_TO_WARP = 384
"""From this size on, ConvNeXT's processor resizes the whole picture instead of cropping its centre."""

_KINDS: Mapping[str, type[Any]] = {
    "Beit": transformers.BeitImageProcessorPil,
    "Bit": transformers.BitImageProcessorPil,
    "CLIP": transformers.CLIPImageProcessorPil,
    "ConvNext": transformers.ConvNextImageProcessorPil,
    "DeiT": transformers.DeiTImageProcessorPil,
    "EfficientNet": transformers.EfficientNetImageProcessorPil,
    "Levit": transformers.LevitImageProcessorPil,
    "MobileNetV1": transformers.MobileNetV1ImageProcessorPil,
    "MobileNetV2": transformers.MobileNetV2ImageProcessorPil,
    "MobileViT": transformers.MobileViTImageProcessorPil,
    "Pvt": transformers.PvtImageProcessorPil,
    "Siglip": transformers.SiglipImageProcessorPil,
    "ViT": transformers.ViTImageProcessorPil,
}
"""Processors whose steps are known here; of each, only the defaults for missing settings are used."""

_OWN = (
    *("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "crop_pct", "do_resize"),
    *("do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order", "rescale_offset", "include_top"),
)


@dataclass(frozen=True)
class PictureSettings:
    """How a picture becomes numbers: resized to `size`, or its shorter side to `shortest`; cut to `crop`; normalised.

    `size` and `crop` are height and width; either `size` or `shortest` is given, or neither: as the picture is.
    """

    size: tuple[int, int] | None
    shortest: int | None
    crop: tuple[int, int] | None
    resample: int
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_bgr: bool = False

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return len(self.mean)

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width of what the model gets."""
        found = self.crop or self.size
        assert found is not None
        return found

    def resized(self, side: int) -> PictureSettings:
        """The same settings for `side` pixels each way; the crop keeps the same part of the picture."""
        if self.shortest is not None and self.crop is not None:
            shortest = round(self.shortest * side / min(self.crop))
            return PictureSettings(
                None, shortest, (side, side), self.resample, self.factor, self.mean, self.std, self.is_bgr
            )
        return PictureSettings((side, side), None, None, self.resample, self.factor, self.mean, self.std, self.is_bgr)

    def to_dict(self) -> dict[str, Any]:
        """The settings as the content of preprocessor_config.json."""
        size = dict(zip(("height", "width"), self.size or self.seen, strict=True))
        if self.shortest:
            size = {"shortest_edge": self.shortest}
        return {
            "image_processor_type": "MobileViTImageProcessor" if self.is_bgr else "ViTImageProcessor",
            "do_resize": self.size is not None or self.shortest is not None,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": dict(zip(("height", "width"), self.seen, strict=True)),
            "do_rescale": True,
            "rescale_factor": self.factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
            **({"do_flip_channel_order": True, "do_reduce_labels": False} if self.is_bgr else {}),
        }


def default_settings(side: tuple[int, int], channels: int) -> PictureSettings:
    """Defaults for a model without settings: the whole picture, resized; ImageNet's mean and standard deviation."""
    mean, std = (_IMAGENET_MEAN, _IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    return PictureSettings(side, None, None, Image.Resampling.BILINEAR, 1 / 255, mean, std)


def read_settings(values: Mapping[str, Any], *, channels: int) -> PictureSettings:
    """The known settings of a preprocessor_config.json. Raises FolderInvalid for those of unknown kinds or types."""
    kind = _kind_of(values)
    values = _with_defaults(values, _KINDS[kind])
    size, shortest, crop = _sizes(values, kind)
    mean, std = _numbers(values, "image_mean", channels), _numbers(values, "image_std", channels)
    if not _flag(values, "do_normalize"):
        mean, std = (0.0,) * channels, (1.0,) * channels
    if any(each <= 0 for each in std):
        raise _wrong("image_std", values.get("image_std"), "numbers over 0")
    if kind == "EfficientNet" and _flag(values, "include_top"):
        std = tuple(each * each for each in std)  # Its processor divides once more.
    factor = values["rescale_factor"]
    if not _is_number(factor) or not 0 < factor < 1000:
        raise _wrong("rescale_factor", factor, "a number over 0")
    if _flag(values, "rescale_offset"):
        raise FolderInvalid(f"{FILE} has rescale_offset, which is not applied here; leave it out", file=FILE)
    if not _flag(values, "do_rescale"):
        factor = 1.0
    resample = values["resample"]
    if not isinstance(resample, int) or isinstance(resample, bool) or not 0 <= resample <= 5:
        raise _wrong("resample", resample, "0 to 5")
    is_bgr = _flag(values, "do_flip_channel_order") and channels == 3
    return PictureSettings(size, shortest, crop, int(resample), float(factor), mean, std, is_bgr)


def processed(picture: Image.Image, settings: PictureSettings) -> np.ndarray:
    """A picture as the model's input, fp32 [channels, H, W], by the steps of transformers' Pillow processors."""
    if settings.size is not None:
        picture = picture.resize((settings.size[1], settings.size[0]), Image.Resampling(settings.resample))
    elif settings.shortest is not None:
        picture = picture.resize(_by_shortest(picture.size, settings.shortest), Image.Resampling(settings.resample))
    if settings.crop is not None:
        picture = _centre(picture, *settings.crop)
    return normalised(picture, settings)


def box_seen(size: tuple[int, int], settings: PictureSettings) -> tuple[float, float, float, float]:
    """The part of a picture of this width and height that `processed` keeps: (left, top, right, bottom) in its pixels.

    It is larger than the picture if its crop has a border.
    """
    resized = size
    if settings.size is not None:
        resized = (settings.size[1], settings.size[0])
    elif settings.shortest is not None:
        resized = _by_shortest(size, settings.shortest)
    left, top, right, bottom = 0, 0, *resized
    if settings.crop is not None:
        height, width = settings.crop
        left, top = _corner(resized, height, width)
        right, bottom = left + width, top + height
    across, down = size[0] / resized[0], size[1] / resized[1]
    return left * across, top * down, right * across, bottom * down


def normalised(picture: Image.Image, settings: PictureSettings) -> np.ndarray:
    """Normalised pixels, fp32 [channels, H, W]."""
    pixels_HWC = np.asarray(picture, dtype=np.float32).reshape(picture.height, picture.width, settings.channels)
    pixels_HWC = pixels_HWC * np.float32(settings.factor)
    if settings.is_bgr:
        pixels_HWC = pixels_HWC[..., ::-1]
    found = (pixels_HWC - np.asarray(settings.mean, np.float32)) / np.asarray(settings.std, np.float32)
    return np.ascontiguousarray(found.transpose(2, 0, 1))


def _by_shortest(size: tuple[int, int], shortest: int) -> tuple[int, int]:
    width, height = size
    short, long = min(size), max(size)
    other = max(int(shortest * long / short), 1)
    # The longer side of a narrow strip of pixels would become enormous.
    other = min(other, 16 * _LARGEST_SIDE)
    return (shortest, other) if width <= height else (other, shortest)


def _centre(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of a picture, with a black border if it is smaller."""
    left, top = _corner(picture.size, height, width)
    return picture.crop((left, top, left + width, top + height))


def _corner(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Where the centre of a picture of this width and height begins: (left, top), under 0 if the picture is smaller."""
    left, top = (each // 2 if each >= 0 else -((1 - each) // 2) for each in (size[0] - width, size[1] - height))
    return left, top


def _kind_of(values: Mapping[str, Any]) -> str:
    named = values.get("image_processor_type") or values.get("feature_extractor_type") or "ViTImageProcessor"
    plain = str(named).removesuffix("Pil").removesuffix("Fast")
    kind = plain.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if kind not in _KINDS:
        known = ", ".join(f"{each}ImageProcessor" for each in _KINDS)
        raise FolderInvalid(
            f"{FILE} names the image processor {shorten(str(named))!r}, which is not known here; known are {known}: "
            "use a model with one of them",
            file=FILE,
        )
    return kind


def _with_defaults(values: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """The known settings; missing or null ones have their processor's default."""
    own = {name: getattr(kind, name, None) for name in _OWN}
    own = {**own, "rescale_factor": own["rescale_factor"] or 1 / 255}
    given = {name: values[name] for name in _OWN if values.get(name) is not None}
    if isinstance(given.get("size"), int) and not getattr(kind, "default_to_square", True):
        given["size"] = {"shortest_edge": given["size"]}
    return {**own, **given}


def _sizes(values: Mapping[str, Any], kind: str) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    crop = None
    if _flag(values, "do_center_crop"):
        crop = _pair(values["crop_size"] or values["size"], "crop_size")
    given = values["size"]
    shortest = given.get("shortest_edge") if isinstance(given, dict) else None
    if not _flag(values, "do_resize"):
        return None, None, crop or _pair(given if shortest is None else shortest, "size")
    if shortest is None:
        return _pair(given, "size"), None, crop
    _check_side(shortest, "size")
    if kind == "ConvNext":
        return _convnext(values, shortest)
    if kind == "Levit":
        shortest = int((256 / 224) * shortest)
    if crop is None:
        raise FolderInvalid(
            f"{FILE} resizes the shorter side and cuts nothing, so pictures would differ in size; set do_center_crop "
            "and crop_size, or a size with height and width",
            file=FILE,
        )
    return None, shortest, crop


def _convnext(
    values: Mapping[str, Any], shortest: int
) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    share = values["crop_pct"]
    if not _is_number(share) or not 0 < share <= 1:
        raise _wrong("crop_pct", share, "a number over 0, at most 1")
    if shortest >= _SHORTEST_TO_WARP:
        return (shortest, shortest), None, None
    return None, int(shortest / share), (shortest, shortest)


def _pair(given: Any, name: str) -> tuple[int, int]:
    if type(given) is int:
        found: tuple[Any, Any] = (given, given)
    elif isinstance(given, dict):
        found = (given.get("height"), given.get("width"))
    elif isinstance(given, list) and len(given) == 2:
        found = (given[0], given[1])
    else:
        found = (None, None)
    for each in found:
        _check_side(each, name)
    return found


def _check_side(side: Any, name: str) -> None:
    if type(side) is not int or not 1 <= side <= _LARGEST_SIDE:
        raise _wrong(name, side, f"height and width, 1 to {_LARGEST_SIDE:,} pixels")


def _numbers(values: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    given = values[name]
    if channels == 1 and isinstance(given, list | tuple) and len(given) == 3 and len(set(given)) == 1:
        given = given[:1]
    given = [given] * channels if _is_number(given) else given
    is_list = isinstance(given, list | tuple) and len(given) == channels
    if not is_list or not all(_is_number(each) and math.isfinite(each) for each in given):
        raise _wrong(name, given, f"{channels} numbers, one for each channel of the model's num_channels")
    return tuple(float(each) for each in given)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    given = values[name]
    if given is None:
        return False
    if not isinstance(given, bool):
        raise _wrong(name, given, "true or false")
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(name: str, value: Any, rule: str) -> FolderInvalid:
    return FolderInvalid(f"{FILE} has {name}: {shorten(str(value))!r}, which is not {rule}; correct it", file=FILE)
