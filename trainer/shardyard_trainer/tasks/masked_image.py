"""Pretraining by predicting the masked parts of pictures (SimMIM, Xie et al., 2022), with new masks in every pass."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.picture_rows import read_pictures
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.holdout import split_by_lot
from shardyard_trainer.inputs.image import Augmentation, EncodedPicture, ImageInputs, positions
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.masked_pictures import MaskedPictureSamples, Masks
from shardyard_trainer.inputs.pictures import Pictures, load_pictures
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import Footprint, Output, Parts, TaskWarning, at_once, has_head, violation
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.mask_sizes import choose_masks, fit_stride
from shardyard_trainer.tasks.masked_image_module import MaskedImageMetrics, MaskedImageModule
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.picture_tasks import (
    augmentation,
    choose_inputs,
    choose_model,
    does_not_fit,
    imagine_pictures,
    probe,
)
from shardyard_trainer.tasks.texts import Splits


class MaskedImage:
    """The task `masked_image`."""

    name = "masked_image"
    output = Output.MODEL
    roles = ("image",)
    auto = "AutoModelForMaskedImageModeling"
    pipeline = "image-feature-extraction"
    example = ""
    usage = (
        "from PIL import Image, ImageOps\n"
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # this folder\n'
        'model = AutoModel.from_pretrained(".").eval()\n'
        'mode = "RGB" if len(processor.image_mean) == 3 else "L"\n'
        'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert(mode)\n'
        'logits = model(**processor(picture, return_tensors="pt")).last_hidden_state  # to be fine-tuned\n'
    )
    cuts = False
    holds_out_by_lot = True
    inputs = ImageInputs

    def prepare(self, job: Ingredients) -> PreparedMaskedImage:
        """Finds and checks model and data. Raises SpecError."""
        ready = job.attempt(lambda: _choose(job))
        train_files, eval_files = job.files()
        if job.spec.HasField("tokenizer"):
            job.errors.append(SpecError("spec.tokenizer", "SPEC_INVALID", "pictures have none; leave it out"))
        raise_all(job.errors)
        assert ready is not None and train_files is not None
        choice, inputs, masks = ready

        def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
            deque(read_pictures(files, source, labels=None, field=field), maxlen=0)

        with job.looking_on(None, eval_files, look_through):
            train = _load(job, train_files, "train_data")
        held_out = _load(job, eval_files, "eval_data") if eval_files is not None else None
        choice = job.accept_weights(choice, self.auto)
        splits = _split(job, inputs, masks, train, held_out)
        return PreparedMaskedImage(choice, inputs, splits, job.warnings, masks=masks, field=job.field)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedMaskedImage:
        """With the masks that the spec, or the size of the pictures, asks for. Raises SpecError."""
        choice, inputs, masks = _choose(job)
        splits = imagine_pictures(inputs, data)
        return PreparedMaskedImage(choice, inputs, splits, job.warnings, masks=masks, field=job.field)

    def open(self, loaded: Loaded, inputs: ImageInputs) -> MaskedImagePredictor:
        """A predictor that compares exports and refuses requests."""
        return MaskedImagePredictor(self.name, loaded, inputs)


TASK = MaskedImage()


def _choose(job: Ingredients) -> tuple[ModelChoice, ImageInputs, Masks]:
    choice = choose_model(job, architectures.masked_picture_refusal, architectures.MASKED_PICTURE_MODELS)
    inputs = choose_inputs(job, choice)
    stride = fit_stride(choice, inputs.settings.seen, job.field, is_fixed=has_head(choice, TASK))
    return choice, inputs, choose_masks(job, choice.config, inputs.settings.seen, stride)


def _load(job: Ingredients, files: list[DataFile], name: str) -> Pictures:
    source: spec_pb2.DataSource = getattr(job.spec, name)
    found = load_pictures(files, source, cache_dir=job.cache_dir, field=f"spec.{name}")
    for reason, message in found.notes:
        job.warn(reason, message, f"spec.{name}")
    return found


def _split(
    job: Ingredients, inputs: ImageInputs, masks: Masks, train: Pictures, held_out: Pictures | None
) -> Splits[MaskedPictureSamples]:
    changes = augmentation(job.wanted)

    def samples(pictures: Pictures, index: np.ndarray, changes: Augmentation | None) -> MaskedPictureSamples:
        return MaskedPictureSamples(pictures, index, inputs, masks, augmentation=changes, seed=job.seed)

    everything = np.arange(train.store.num_sequences)
    if held_out is not None:
        return samples(train, everything, changes), samples(held_out, np.arange(held_out.store.num_sequences), None)
    kept, held = split_by_lot(len(everything), job.holdout, job.seed)
    return samples(train, kept, changes), samples(train, held, None) if len(held) else None


class PreparedMaskedImage:
    """The task with its model and data."""

    task = TASK
    unit = "sample"
    learning_rate: float | None = None
    smallest_batch = 1

    def __init__(
        self,
        choice: ModelChoice,
        inputs: ImageInputs,
        splits: Splits[MaskedPictureSamples],
        warnings: Sequence[TaskWarning],
        *,
        masks: Masks,
        field: str,
    ) -> None:
        self.choice = choice
        self.inputs = inputs
        self.train, self.eval = splits
        self.warnings = warnings
        self.length = positions(inputs.settings.seen)
        self._masks = masks
        settings = inputs.settings
        mask = torch.ones(2, masks.places, masks.places, dtype=torch.bool, device="meta")
        seen = {"pixel_values": torch.empty(2, settings.channels, *settings.seen, device="meta"), "mask": mask}
        outputs, self._kept_bytes, self._forward_flops, _ = probe(self, seen, field)
        if tuple(outputs["reconstruction"].shape[2:]) != settings.seen:
            why = f"it reconstructs {list(outputs['reconstruction'].shape[2:])}"
            raise does_not_fit(choice, inputs, why, field)

    def make_module(self, *, meta: bool) -> MaskedImageModule:
        """Transformers' own model with its decoder."""
        model, _ = loading.load(transformers.AutoModelForMaskedImageModeling, self.choice, meta=meta)
        return MaskedImageModule(model)

    def metrics(self) -> MaskedImageMetrics:
        """A new, empty collector of metrics."""
        return MaskedImageMetrics()

    def resolve(self, message: Any) -> None:
        """Fills in sizes, share and augmentation."""
        message.image_size = self.inputs.settings.seen[0]
        message.mask_patch, message.mask_ratio = self._masks.pixels, self._masks.ratio
        if not message.HasField("crop_scale"):
            message.crop_scale = 1.0
        if not message.HasField("flip"):
            message.flip = 0.0

    def footprint(self) -> Footprint:
        """No vocabulary; the probe measured what the backward pass keeps of a picture."""
        return Footprint(0, 0, self._kept_bytes // self.length, self._forward_flops // self.length)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        height, width = self.inputs.settings.seen
        masked = {"mask_patch": self._masks.pixels, "mask_ratio": self._masks.ratio}
        return {"task": TASK.name, "height": height, "width": width, **masked}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if filling in one colour would be as good."""
        loss, plain = metrics.get("loss"), metrics.get("one_colour_loss")
        if loss is None or plain is None or loss < plain:
            return None
        message = f"the loss is {loss:.4g}, and {plain:.4g} for the mean colour of what is seen of each picture"
        return TaskWarning("NO_BETTER_THAN_ONE_COLOUR", f"{message}; more epochs or a higher learning_rate may help")


@dataclasses.dataclass(frozen=True)
class MaskedImagePredictor:
    """Refuses every request: a pretrained model has no useful answer yet."""

    takes: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[str] = ""

    task: str
    loaded: Loaded
    inputs: ImageInputs

    def refuse(self, _request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses every request, with the next step."""
        message = (
            f"a {self.task} model is pretrained and predicts nothing yet; fine-tune it for image_classification, or "
            "get vectors of pictures with Embed"
        )
        return [violation("model", "TASK_MISMATCH", message)]

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[EncodedPicture]:
        """Decodes pictures."""
        return [self.inputs.encode_or_say(instance.image) for instance in instances]

    def complain(self, _encoded: Sequence[EncodedPicture]) -> list[worker_pb2.Violation]:
        """No violations: `refuse` has refused the request already."""
        return []

    def most_bytes(self, _request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedPicture]) -> list[int]:
        """0: there are no answers."""
        return [0] * len(encoded)

    def answer(
        self, _request: model_service_pb2.PredictRequest, _encoded: Sequence[EncodedPicture], _places: Sequence[int]
    ) -> Parts:
        """No answers."""
        return at_once(list)

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstructions of the same masked pictures by both models."""
        found = []
        for model in (live.model, self.loaded.model):
            parameter = next(model.parameters())
            pixels = batch.inputs["pixel_values"].to(parameter.device, parameter.dtype)
            mask = batch.inputs["mask"].flatten(1).to(parameter.device)
            found.append(model(pixel_values=pixels, bool_masked_pos=mask).reconstruction.float().cpu())
        return found[0], found[1]
