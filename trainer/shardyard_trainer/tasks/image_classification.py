"""Fine-tuning for picture classification with one label or several labels a picture."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError, listed, raise_all
from shardyard_trainer.data.label_column import Wanted
from shardyard_trainer.data.labels import LABELS_FIELD, MULTI_LABEL, SINGLE_LABEL, LabelSchema, check_labels
from shardyard_trainer.data.picture_rows import read_pictures
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.image import Augmentation, ImageInputs, positions
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.labelled import hold_out
from shardyard_trainer.inputs.pictures import LabelledPictures, LabelledSamples, load_labelled
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import Footprint, Graph, Output, TaskWarning, Teaching, has_head
from shardyard_trainer.tasks.heads import load_with_labels
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.kept_heads import PROBLEMS, head_order
from shardyard_trainer.tasks.metrics import one_answer
from shardyard_trainer.tasks.picture_classifier import PictureClassifier
from shardyard_trainer.tasks.picture_module import PictureMetrics, PictureModule
from shardyard_trainer.tasks.picture_tasks import (
    augmentation,
    choose_inputs,
    choose_model,
    does_not_fit,
    imagine_pictures,
    probe,
)
from shardyard_trainer.tasks.texts import Splits

_KINDS = {SINGLE_LABEL: "single_label_classification", MULTI_LABEL: "multi_label_classification"}


class ImageClassification:
    """The task `image_classification`."""

    name = "image_classification"
    output = Output.MODEL
    roles = ("image", "label")
    auto = "AutoModelForImageClassification"
    pipeline = "image-classification"
    example = ""
    usage = (
        "from PIL import Image, ImageOps\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        'processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # this folder\n'
        'model = AutoModelForImageClassification.from_pretrained(".").eval()\n'
        'mode = "RGB" if len(processor.image_mean) == 3 else "L"\n'
        'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert(mode)\n'
        'logits = model(**processor(picture, return_tensors="pt")).logits\n'
    )
    cuts = False
    holds_out_by_lot = True
    inputs = ImageInputs
    explains = "regions of the picture"
    graph = Graph({"logits": ("batch",)})
    teaching = Teaching(own=("image_size",))

    def prepare(self, job: Ingredients) -> PreparedPictures:
        """Finds and checks model and data. Raises SpecError."""
        with _said_of(job.field):
            return _prepare(job)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedPictures:
        """With two labels, or those of the model's own head. Raises SpecError."""
        choice = choose_model(job)
        inputs = choose_inputs(job, choice)
        own = choice.described.labels if choice.described is not None and has_head(choice, TASK) else ()
        prepared = PreparedPictures(
            choice,
            inputs,
            imagine_pictures(inputs, data),
            job.warnings,
            schema=LabelSchema(SINGLE_LABEL, tuple(own) or ("no", "yes")),
            wanted=job.wanted,
            keeps_head=bool(own),
        )
        prepared.probe(job.field, job.spec)
        return prepared

    def open(self, loaded: Loaded, inputs: ImageInputs) -> PictureClassifier:
        """A predictor of classes. Raises FolderInvalid if the head's outputs and the labels differ in number."""
        labels = loaded.folder.labels
        if loaded.num_outputs != len(labels):
            text = f"the head has {loaded.num_outputs} outputs for {len(labels)} labels"
            raise FolderInvalid(text, file="config.json")
        return PictureClassifier(self.name, loaded, inputs)


TASK = ImageClassification()


@contextmanager
def _said_of(field: str) -> Iterator[None]:
    """Moves errors about labels to this task's field."""
    try:
        yield
    except SpecError as error:
        for each in error.all():
            if each.field.startswith(LABELS_FIELD):
                each.field = f"{field}.labels{each.field.removeprefix(LABELS_FIELD)}"
        raise


def _prepare(job: Ingredients) -> PreparedPictures:
    spec, wanted = job.spec, job.wanted
    choice = job.attempt(lambda: choose_model(job))
    inputs = job.attempt(lambda: choose_inputs(job, choice)) if choice is not None else None
    train_files, eval_files = job.files()
    problem = wanted.problem or SINGLE_LABEL
    if wanted.labels:
        job.attempt(lambda: check_labels(wanted.labels, problem))
    if wanted.label_smoothing and problem != SINGLE_LABEL:
        message = f"{wanted.label_smoothing:g}: for single labels only; leave it out"
        job.errors.append(SpecError(f"{job.field}.label_smoothing", "SPEC_INVALID", message))
    if spec.HasField("tokenizer"):
        job.errors.append(SpecError("spec.tokenizer", "SPEC_INVALID", "pictures have none; leave it out"))
    raise_all(job.errors)
    assert choice is not None and inputs is not None and train_files is not None

    def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
        deque(read_pictures(files, source, labels=wanted.labels, field=field), maxlen=0)

    with job.looking_on(None, eval_files, look_through):
        train = _load(job, train_files, "train_data", tuple(wanted.labels))
        order = () if wanted.labels or wanted.new_head else head_order(choice, train.schema.labels, TASK)
        if order:
            train = _load(job, train_files, "train_data", order)
    held_out = None
    if eval_files is not None:
        held_out = _load(job, eval_files, "eval_data", train.schema.labels, like=train.label_way)
    return _assemble(job, choice, inputs, train, held_out)


def _load(
    job: Ingredients, files: list[DataFile], name: str, labels: tuple[str, ...], *, like: str = ""
) -> LabelledPictures:
    wanted = Wanted(job.wanted.problem or SINGLE_LABEL, labels, like=like)
    field = f"spec.{name}"
    source: spec_pb2.DataSource = getattr(job.spec, name)
    found = load_labelled(files, source, wanted=wanted, cache_dir=job.cache_dir, field=field)
    for reason, message in found.notes:
        job.warn(reason, message, field)
    return found


def _assemble(
    job: Ingredients,
    choice: ModelChoice,
    inputs: ImageInputs,
    train: LabelledPictures,
    held_out: LabelledPictures | None,
) -> PreparedPictures:
    wanted, labels = job.wanted, train.schema.labels
    own = choice.described.labels if choice.described is not None and has_head(choice, TASK) else ()
    problem = choice.described.problem if choice.described is not None else ""
    keeps = bool(own) and not wanted.new_head and own == labels and problem == PROBLEMS[train.schema.problem]
    choice = job.accept_weights(choice, TASK.auto if keeps else "")
    if not choice.is_fresh and not keeps:
        what = "the model has no head for this task"
        if own:
            has_others = own != labels
            what = f"the model's head has {len(own)} other labels ({listed(own, most=4)})" if has_others else ""
            what = what or "the model's head is put aside"
        job.warn("NEW_HEAD", f"{what}: a new one is started", choice.field)
    splits = _split(job, inputs, train, held_out)
    prepared = PreparedPictures(
        choice,
        inputs,
        splits,
        job.warnings,
        schema=train.schema,
        wanted=wanted,
        keeps_head=keeps,
    )
    prepared.probe(job.field, job.spec)
    return prepared


def _split(
    job: Ingredients, inputs: ImageInputs, train: LabelledPictures, held_out: LabelledPictures | None
) -> Splits[LabelledSamples]:
    changes = augmentation(job.wanted)

    def samples(pictures: LabelledPictures, index: np.ndarray, changes: Augmentation | None) -> LabelledSamples:
        return LabelledSamples(pictures, index, inputs, augmentation=changes, seed=job.seed)

    if held_out is not None:
        everything = np.arange(train.store.num_sequences)
        others = np.arange(held_out.store.num_sequences)
        return samples(train, everything, changes), samples(held_out, others, None)
    train_index, eval_index, warning = hold_out(train, job.holdout, job.seed)
    if warning:
        job.warn("RARE_LABELS", warning, "spec.train_data")
    return samples(train, train_index, changes), samples(train, eval_index, None) if len(eval_index) else None


class PreparedPictures:
    """The task with its model and data."""

    task = TASK
    unit = "sample"
    answers_with_labels = True
    learning_rate: float | None = None
    smallest_batch = 1

    def __init__(
        self,
        choice: ModelChoice,
        inputs: ImageInputs,
        splits: Splits[LabelledSamples],
        warnings: Sequence[TaskWarning],
        *,
        schema: LabelSchema,
        wanted: spec_pb2.ImageClassification,
        keeps_head: bool,
    ) -> None:
        self.choice = choice
        self.inputs = inputs
        self.train, self.eval = splits
        self.warnings = warnings
        self.schema = schema
        self.length = positions(inputs.settings.seen)
        self._label_smoothing = wanted.label_smoothing
        self._keeps_head = keeps_head
        self._kept_bytes = 0
        self._forward_flops = 0
        self._needs_two = False

    def make_module(self, *, meta: bool) -> PictureModule:
        """Transformers' own model with its head."""
        kind = _KINDS[self.schema.problem]
        auto = transformers.AutoModelForImageClassification
        labels, keeps = self.schema.labels, self._keeps_head
        model = load_with_labels(auto, self.choice, None, labels, keeps_head=keeps, meta=meta, problem_type=kind)
        return PictureModule(
            model,
            problem=self.schema.problem,
            label_smoothing=self._label_smoothing,
            needs_two=self._needs_two,
        )

    def probe(self, field: str, spec: spec_pb2.JobSpec) -> None:
        """Runs two pictures on the meta device: whether the model takes them, and what a backward pass would keep.

        Raises SpecError for a model that does not fit this size of pictures.
        """
        settings = self.inputs.settings
        seen = torch.empty(2, settings.channels, *settings.seen, device="meta")
        found = probe(self, {"pixel_values": seen}, field, spec.fine_tuning)
        self._kept_bytes, self._forward_flops, self._needs_two = found.kept_bytes, found.forward_flops, found.needs_two
        if tuple(found.outputs["logits"].shape) != (2, self.schema.num_outputs):
            why = f"its head gives outputs of the shape {list(found.outputs['logits'].shape)}"
            raise does_not_fit(self.choice, self.inputs, why, field)

    def metrics(self) -> PictureMetrics:
        """A new, empty collector of metrics."""
        return PictureMetrics(self.schema)

    def resolve(self, message: Any) -> None:
        """Fills in problem, labels, size and augmentation."""
        if not message.problem:
            message.problem = SINGLE_LABEL
        del message.labels[:]
        message.labels.extend(self.schema.labels)
        height, width = self.inputs.settings.seen
        if height == width and not message.HasField("image_size"):
            message.image_size = height
        if not message.HasField("crop_scale"):
            message.crop_scale = 1.0
        if not message.HasField("flip"):
            message.flip = 0.0
        if message.problem == SINGLE_LABEL and not message.HasField("label_smoothing"):
            message.label_smoothing = 0.0

    def footprint(self) -> Footprint:
        """A few outputs a picture; the activation memory is measured."""
        return Footprint(0, 0, self._kept_bytes // self.length, self._forward_flops // self.length)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        height, width = self.inputs.settings.seen
        labels, problem = list(self.schema.labels), PROBLEMS[self.schema.problem]
        return {"task": TASK.name, "problem": problem, "labels": labels, "height": height, "width": width}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if all answers are the same."""
        return one_answer(metrics)
