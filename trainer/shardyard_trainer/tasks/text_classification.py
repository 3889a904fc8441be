"""Fine-tuning for texts or pairs of texts: one label, several labels, or a number."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import transformers
from torch import nn

from shardyard.v1 import spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.columns import read_rows
from shardyard_trainer.data.errors import DataError, SpecError, raise_all
from shardyard_trainer.data.label_canon import LOOKALIKE
from shardyard_trainer.data.label_column import wanted_labels
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelSchema, check_labels
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.labelled import ClassificationSamples, Examples, hold_out, load_examples
from shardyard_trainer.inputs.text import TextInputs, adapt
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.models.weights import read_tensors
from shardyard_trainer.tasks.base import Footprint, Graph, Output, TaskWarning, Teaching, has_head
from shardyard_trainer.tasks.class_weights import find_weights
from shardyard_trainer.tasks.heads import (
    TextClassifier,
    draw,
    head_dropout,
    load_with_labels,
    with_labels,
    without_pooler,
)
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.kept_heads import PROBLEMS, head_order, keeps_head
from shardyard_trainer.tasks.metrics import ClassificationMetrics, one_answer
from shardyard_trainer.tasks.text_classifier import Classifier
from shardyard_trainer.tasks.texts import (
    DEFAULT_MAX_LENGTH,
    PreparedText,
    Splits,
    choose_reader,
    find_length,
    find_tokenizer,
    imagine_texts,
)
from shardyard_trainer.tasks.vectors import POOLING_VALUES, POOLINGS

_TRANSFORMERS_PROBLEMS = {
    SINGLE_LABEL: "single_label_classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}
_MANY_LABELS = 20


class TextClassification:
    """The task `text_classification`."""

    name = "text_classification"
    output = Output.MODEL
    roles = ("text", "text_pair", "label")
    auto = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    example = '"Hello, my dog is cute"'
    usage = ""
    cuts = True
    holds_out_by_lot = True
    inputs = TextInputs
    explains = "words"
    graph = Graph({"logits": ("batch",)})
    teaching = Teaching(own=("pooling",))

    def prepare(self, job: Ingredients) -> PreparedClassification:
        """Finds and checks model and data. Raises SpecError (LABEL_MISMATCH for a head with other labels)."""
        return _prepare(job)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedClassification:
        """With two labels, or those of the model's own head. Raises SpecError."""
        choice = choose_reader(job)
        inputs, splits = imagine_texts(job, choice, data, "max_length", DEFAULT_MAX_LENGTH)
        labels = choice.described.labels if choice.described is not None and has_head(choice, TASK) else ()
        return _assemble(job, choice, inputs, splits, LabelSchema(SINGLE_LABEL, tuple(labels) or ("no", "yes")))

    def open(self, loaded: Loaded, inputs: TextInputs) -> Classifier:
        """A predictor of classes. Raises FolderInvalid if the head's outputs and the labels differ in number."""
        labels = loaded.folder.labels
        if loaded.num_outputs != max(len(labels), 1):
            raise FolderInvalid(
                f"the head has {loaded.num_outputs} outputs for {len(labels)} labels", file="config.json"
            )
        return Classifier(self.name, loaded, inputs)


TASK = TextClassification()


def _prepare(job: Ingredients) -> PreparedClassification:
    spec, wanted = job.spec, job.wanted
    choice = job.attempt(lambda: choose_reader(job))
    train_files, eval_files = job.files()
    _check_settings(job)
    raise_all(job.errors)
    assert choice is not None and train_files is not None

    def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
        several = wanted.problem == MULTI_LABEL
        rows = read_rows(
            files,
            source,
            with_label=True,
            several_labels=several,
            label_columns=wanted.label_columns,
            field=field,
        )
        deque(rows, maxlen=0)

    with job.looking_on(train_files, eval_files, look_through):
        published = choice.described.sentence.max_length if choice.described and choice.described.sentence else None
        default = published or DEFAULT_MAX_LENGTH
        length = find_length(job, choice, "max_length", default)
        tokenizer = find_tokenizer(job, choice, train_files)
        choice = adapt(choice, tokenizer, length)
    inputs = TextInputs(tokenizer, length)
    with job.looking_on(None, eval_files, look_through):
        train = _examples(job, inputs, train_files, spec.train_data, labels=wanted.labels, field="spec.train_data")
        # If the head's labels are those of the data, its order is used: its outputs keep their meaning.
        order = () if wanted.labels or wanted.new_head else head_order(choice, train.schema.labels, TASK)
        if order:
            train = _examples(job, inputs, train_files, spec.train_data, labels=order, field="spec.train_data")
    held_out = None
    if eval_files is not None:
        held_out = _examples(
            job,
            inputs,
            eval_files,
            spec.eval_data,
            labels=train.schema.labels,
            field="spec.eval_data",
            like=train.label_way,
        )
        if held_out.has_pairs != train.has_pairs:
            raise DataError("training data and evaluation data differ in having a second text", field="spec.eval_data")
    return _assemble(job, choice, inputs, _samples(job, choice, inputs, train, held_out), train.schema)


def _check_settings(job: Ingredients) -> None:
    wanted = job.wanted
    problem = wanted.problem or SINGLE_LABEL
    if wanted.labels:
        job.attempt(lambda: check_labels(wanted.labels, problem))
    if wanted.label_separator and problem != MULTI_LABEL:
        message = f"{wanted.label_separator!r}: for several labels only; set problem to multi_label, or leave it out"
        job.errors.append(SpecError(f"{job.field}.label_separator", "SPEC_INVALID", message))
    if wanted.label_smoothing and problem != SINGLE_LABEL:
        message = f"{wanted.label_smoothing:g}: for single labels only"
        job.errors.append(SpecError(f"{job.field}.label_smoothing", "SPEC_INVALID", message))
    if wanted.HasField("class_weights") and problem != SINGLE_LABEL:
        message = "for single labels only; leave it out"
        job.errors.append(SpecError(f"{job.field}.class_weights", "SPEC_INVALID", message))


def _examples(
    job: Ingredients,
    inputs: TextInputs,
    files: list[DataFile],
    source: spec_pb2.DataSource,
    *,
    labels: Iterable[str],
    field: str,
    like: str = "",
) -> Examples:
    found = load_examples(
        files,
        source,
        inputs.tokenizer,
        max_length=inputs.length or 0,
        wanted=wanted_labels(job.wanted, tuple(labels), like=like),
        cache_dir=job.cache_dir,
        field=field,
    )
    # From the evaluation data only notes about its own spelling and rows.
    for reason, message in found.label_notes:
        if not like or reason in (LOOKALIKE, bad_rows.REASON):
            job.warn(reason, message, field)
    return found


def _samples(
    job: Ingredients, choice: ModelChoice, inputs: TextInputs, train: Examples, held_out: Examples | None
) -> Splits[ClassificationSamples]:
    with_types = architectures.has_token_types(choice.config)
    padding = int(inputs.tokenizer.pad_token_id or 0)

    def samples(examples: Examples, index: np.ndarray) -> ClassificationSamples:
        return ClassificationSamples(examples, index, with_types=with_types, padding=padding)

    if held_out is not None:
        everything = np.arange(train.store.num_sequences)
        return samples(train, everything), samples(held_out, np.arange(held_out.store.num_sequences))
    train_index, eval_index, warning = hold_out(train, job.holdout, job.seed)
    if warning:
        job.warn("RARE_LABELS", warning, "spec.train_data")
    return samples(train, train_index), samples(train, eval_index) if len(eval_index) else None


def _assemble(
    job: Ingredients,
    choice: ModelChoice,
    inputs: TextInputs,
    splits: Splits[ClassificationSamples],
    schema: LabelSchema,
) -> PreparedClassification:
    wanted = job.wanted
    pooling = POOLINGS.get(wanted.pooling) or architectures.default_pooling(choice.config, choice.described)
    is_native = architectures.native_pooling(choice.config, choice.described) == pooling
    keeps = keeps_head(choice, schema, pooling, job.field, task=TASK, new_head=wanted.new_head)
    choice = job.accept_weights(choice, TASK.auto if is_native and keeps else "")
    if not choice.is_fresh and not keeps:
        reshaped = choice.described.reshaped if choice.described is not None else ""
        without = reshaped or "the model has no head for this task"
        what = "the model's head is put aside" if has_head(choice, TASK) else without
        job.warn("NEW_HEAD", f"{what}: a new one is started", choice.field)
    labels, num_samples = schema.labels, splits[0].num_samples
    splits[0].weights = find_weights(job, labels, splits[0].counts)
    if len(labels) > _MANY_LABELS and 2 * len(labels) > num_samples:
        message = f"{len(labels)} labels for {num_samples} texts; if they are numbers, set it to regression"
        job.warn("MANY_LABELS", message, f"{job.field}.problem")
    return PreparedClassification(
        choice,
        inputs,
        splits,
        job.warnings,
        schema=schema,
        pooling=pooling,
        is_native=is_native,
        keeps_head=keeps,
        wanted=wanted,
    )


class PreparedClassification(PreparedText[ClassificationSamples]):
    """The task with its model and data. `is_native`: transformers' own head reads what `pooling` says."""

    task = TASK
    unit = "sample"
    answers_with_labels = True

    def __init__(
        self,
        choice: ModelChoice,
        inputs: TextInputs,
        splits: Splits[ClassificationSamples],
        warnings: list[TaskWarning],
        *,
        schema: LabelSchema,
        pooling: str,
        is_native: bool,
        keeps_head: bool,
        wanted: spec_pb2.TextClassification,
    ) -> None:
        super().__init__(choice, inputs, splits, warnings)
        self.schema = schema
        self.pooling = pooling
        self._is_native = is_native
        self._keeps_head = keeps_head
        self._label_smoothing = wanted.label_smoothing
        layout = {"label_separator": wanted.label_separator, "label_columns": list(wanted.label_columns)}
        self._layout = {name: value for name, value in layout.items() if value}

    def make_module(self, *, meta: bool) -> TextClassifier:
        """Transformers' own model with a head if it has one that reads what `pooling` says, else a linear layer."""
        names = self.schema.labels or ("score",)
        kind = _TRANSFORMERS_PROBLEMS[self.schema.problem]
        if self._is_native:
            auto, tokenizer = transformers.AutoModelForSequenceClassification, self.inputs.tokenizer
            keeps = self._keeps_head
            model = load_with_labels(
                auto, self.choice, tokenizer, names, keeps_head=keeps, meta=meta, problem_type=kind
            )
            head = None
        else:
            choice = with_labels(self.choice, names, problem_type=kind)
            model, _ = loading.load(transformers.AutoModel, choice, meta=meta, **without_pooler(choice.config))
            loading.ensure_pad_id(model, self.inputs.tokenizer)
            head = self._own_head(model.config, meta=meta)
        return TextClassifier(
            model,
            head,
            pooling=self.pooling,
            problem=self.schema.problem,
            dropout=head_dropout(model.config),
            label_smoothing=self._label_smoothing,
            class_weights=self.train.weights,
        )

    def metrics(self) -> ClassificationMetrics:
        """A new, empty collector of metrics."""
        return ClassificationMetrics(self.schema)

    def resolve(self, message: Any) -> None:
        """Fills in length, problem, pooling and labels."""
        message.max_length = self.length
        if not message.problem:
            message.problem = SINGLE_LABEL
        message.pooling = POOLING_VALUES[self.pooling]
        if message.problem == SINGLE_LABEL and not message.HasField("label_smoothing"):
            message.label_smoothing = 0.0
        del message.labels[:]
        message.labels.extend(self.schema.labels)

    def footprint(self) -> Footprint:
        """A few outputs a text."""
        return Footprint(0, 0)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {
            "task": TASK.name,
            "problem": PROBLEMS[self.schema.problem],
            "labels": list(self.schema.labels),
            "pooling": self.pooling,
            "max_length": self.length,
            "head": {"type": "transformers" if self._is_native else "linear", "outputs": self.schema.num_outputs},
            **self._layout,
        }

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if all answers are the same."""
        return one_answer(metrics)

    def _own_head(self, config: Any, *, meta: bool) -> nn.Linear:
        head = nn.Linear(architectures.width(config), self.schema.num_outputs)
        if self._keeps_head and not meta:
            assert self.choice.folder is not None
            head.load_state_dict(read_tensors(self.choice.folder, "head.safetensors"))
        else:
            draw(head, config)
        return head
