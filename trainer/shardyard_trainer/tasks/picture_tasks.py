"""Code shared by the tasks on pictures: a model that reads pictures, their size, and augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.image import Augmentation, ImageInputs, positions
from shardyard_trainer.inputs.image_settings import default_settings
from shardyard_trainer.inputs.imagined import Imagined, number_tensors
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.plain_words import in_plain_words
from shardyard_trainer.tasks.adaptation import adapt
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.picture_module import Kept

DEFAULT_SIDE = 224
_NOT_OF_SIZES = (AttributeError, ImportError, KeyError)
"""Errors that another size of the pictures would not change."""


def choose_model(
    job: Ingredients,
    refusal: Callable[[Any], str] = architectures.picture_refusal,
    such_as: Sequence[str] = architectures.SOME_PICTURE_MODELS,
) -> ModelChoice:
    """The model named in the spec. Raises SpecError for one that `refusal` says something against."""
    choice = job.choose()
    if why := refusal(choice.config):
        known = ", ".join(such_as)
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            why if known in why else f"{why}; use a model such as {known}",
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


def imagine_pictures(inputs: ImageInputs, data: Imagined) -> Any:
    """Samples of pictures that are imagined."""
    settings = inputs.settings
    pixels = number_tensors(settings.channels, *settings.seen, name="pixel_values")
    return data.splits(positions(settings.seen), pixels)


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


class Probed(Protocol):
    """A task with a model that is to be probed."""

    choice: ModelChoice
    inputs: ImageInputs

    def make_module(self, *, meta: bool) -> HuggingFaceModule:
        """The module."""


class Probe(NamedTuple):
    """What two pictures gave on the meta device: outputs; of one the bytes kept for the backward pass, and the
    operations of the forward pass; and whether one alone cannot be trained on.
    """

    outputs: dict[str, torch.Tensor]
    kept_bytes: int
    forward_flops: int
    needs_two: bool


def probe(
    task: Probed, seen: dict[str, torch.Tensor], field: str, adaptation: spec_pb2.FineTuning | None = None
) -> Probe:
    """Runs two pictures on the meta device.

    Raises SpecError for a model that does not take pictures of this size.
    """
    needs_two = False
    with quiet(), torch.device("meta"):
        module = task.make_module(meta=True)
        adapt(module, adaptation or spec_pb2.FineTuning())
        kept, operations = Kept(module), FlopCounterMode(display=False)
        try:
            with kept, operations:
                found = module.train()(**seen, return_outputs=True).outputs
        except LOADING_ERRORS as error:
            why = in_plain_words(error)
            if isinstance(error, _NOT_OF_SIZES):
                kind = task.choice.config.model_type
                text = f"this {kind} does not compute in training: {type(error).__name__}: {why}; correct its code"
                raise SpecError(task.choice.field, "MODEL_INVALID", text) from None
            raise does_not_fit(task.choice, task.inputs, why, field) from None
        try:
            module(**{name: tensor[:1] for name, tensor in seen.items()})
        except ValueError:
            # Batch normalisation cannot train on a single value a channel.
            needs_two = True
    return Probe(found or {}, kept.num_bytes // 2, operations.get_total_flops() // 2, needs_two)
