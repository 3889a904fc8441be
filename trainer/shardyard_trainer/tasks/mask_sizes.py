"""Sizes that must match for masked pictures: the picture, the mask, the patch, and the decoder's stride."""

from __future__ import annotations

from typing import Any

from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.masked_pictures import Masks
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.ingredients import Ingredients

DEFAULT_MASK_PATCH = 32
DEFAULT_MASK_RATIO = 0.6


def fit_stride(choice: ModelChoice, seen: tuple[int, int], field: str, *, is_fixed: bool) -> int:
    """The side in pixels of one position of the last layer; sets the stride of the decoder to it.

    `is_fixed`: the folder has a trained decoder, whose stride must match. Raises SpecError if the sizes do not fit.
    """
    config = choice.config
    patch = config.patch_size
    if type(patch) is not int or patch < 1:
        text = f"patch_size is {patch}; masked_image needs one number for both directions"
        raise SpecError(choice.field, "SPEC_INVALID", text)
    # Swin and its like halve the resolution after each stage except the last.
    stride = patch * 2 ** (len(config.depths) - 1) if hasattr(config, "depths") else patch
    height, width = seen
    if height != width or height % stride or height < 2 * stride:
        fits = ", ".join(str(stride * times) for times in _near(height // stride))
        text = (
            f"pictures of {height} × {width} pixels; masked_image needs squares whose side is a multiple of {stride}, "
            f"the side of one position of this {config.model_type}, and at least twice that, such as {fits}"
        )
        raise SpecError(f"{field}.image_size", "SPEC_INVALID", text)
    if config.encoder_stride != stride:
        given = config.encoder_stride
        text = f"encoder_stride is {given}, but the side of one position of this {config.model_type} is {stride} pixels"
        if "encoder_stride" in choice.overrides:
            place = f"{choice.field}.overrides.encoder_stride"
            raise SpecError(place, "SPEC_INVALID", f"{text}; leave it out, or give {stride}")
        if is_fixed:
            raise SpecError(choice.field, "MODEL_INVALID", f"{text}; correct its config.json")
        config.encoder_stride = stride
    return stride


def choose_masks(job: Ingredients, config: Any, seen: tuple[int, int], stride: int) -> Masks:
    """How pictures are masked: as in the spec, else in squares of 32 pixels, or smaller ones for small pictures.

    Raises SpecError for squares that do not fit the picture or the model's patches.
    """
    wanted, patch, side = job.wanted, config.patch_size, seen[0]
    ratio = wanted.mask_ratio if wanted.HasField("mask_ratio") else DEFAULT_MASK_RATIO
    fitting = [size for size in range(patch, side // 2 + 1, patch) if side % size == 0]
    if not wanted.HasField("mask_patch"):
        # Squares that cover whole positions of the last layer, if there are any.
        small = [size for size in fitting if size <= max(DEFAULT_MASK_PATCH, patch)]
        return Masks(patch, max([size for size in small if size % stride == 0] or small), side, ratio)
    if wanted.mask_patch not in fitting:
        text = (
            f"mask_patch {wanted.mask_patch} must be a multiple of {patch}, the model's patch_size, and divide {side} "
            f"pixels into two or more parts; choose one of {', '.join(map(str, fitting[-6:]))}"
        )
        raise SpecError(f"{job.field}.mask_patch", "SPEC_INVALID", text)
    return Masks(patch, wanted.mask_patch, side, ratio)


def _near(times: int) -> list[int]:
    return sorted({max(times, 2), max(times + 1, 3)})
