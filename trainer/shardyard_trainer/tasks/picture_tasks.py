"""Code shared by the tasks on pictures: a model that reads pictures, their size, and augmentation."""

from __future__ import annotations

from typing import Any

from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.image import Augmentation, ImageInputs
from shardyard_trainer.inputs.image_settings import default_settings
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.ingredients import Ingredients

DEFAULT_SIDE = 224


def choose_model(job: Ingredients) -> ModelChoice:
    """The model that the spec means. Raises SpecError for one that does not see pictures."""
    choice = job.choose()
    if refusal := architectures.picture_refusal(choice.config):
        known = ", ".join(architectures.SOME_PICTURE_MODELS)
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            refusal if known in refusal else f"{refusal}; use a model such as {known}",
            {"supported": known.replace(", ", ",")},
        )
    return choice


def choose_inputs(job: Ingredients, choice: ModelChoice) -> ImageInputs:
    """How pictures are prepared: as the model's folder says, or the defaults of a fresh one; in the spec's size."""
    config, wanted = choice.config, job.wanted
    own = getattr(config, "image_size", None)
    sides = tuple(own) if isinstance(own, list | tuple) and len(own) == 2 else (own, own)
    if not all(type(side) is int and side > 0 for side in sides):
        sides = (DEFAULT_SIDE, DEFAULT_SIDE)
    channels = getattr(config, "num_channels", 3)
    if choice.folder is None:
        side = wanted.image_size if wanted.HasField("image_size") else None
        if side is not None and own is not None:
            config.image_size = side
        return ImageInputs(default_settings((side, side) if side is not None else sides, channels))
    assert choice.described is not None
    try:
        found = ImageInputs.load(choice.folder, choice.described)
    except FolderInvalid as error:
        raise SpecError(choice.field, error.reason, str(error), error.metadata) from None
    if wanted.HasField("image_size") and found.settings.seen != (wanted.image_size, wanted.image_size):
        return ImageInputs(found.settings.resized(wanted.image_size))
    return found


def augmentation(wanted: Any) -> Augmentation | None:
    """What training changes at random, as a task's message says; None: nothing."""
    how = Augmentation(wanted.crop_scale if wanted.HasField("crop_scale") else 1.0, wanted.flip)
    return how if how.crop_scale < 1 or how.flip else None


def does_not_fit(choice: ModelChoice, inputs: ImageInputs, why: str, field: str) -> SpecError:
    """The error of a model that does not take pictures of this size."""
    height, width = inputs.settings.seen
    kind, own = choice.config.model_type, getattr(choice.config, "image_size", None)
    advice = f"its own size is {own}" if own is not None else "give another size"
    text = f"this {kind} does not take pictures of {height} × {width} pixels: {why}; {advice}"
    return SpecError(f"{field}.image_size", "SPEC_INVALID", text)
