"""Measures a model on data: its own task as trained, without training, and all of the data for evaluation.

Planned by `planning.evaluation`, run by `training.evaluating`. A further format of a model (`model_export`) is measured
beside the model in the same way. The settings of the task are those that the model's
folder says (`TrainingTask.describe`, or config.json), so its metrics are those of its training's last evaluation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor

from shardyard.task_paths import task_paths
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, listed
from shardyard_trainer.models import sources
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Output, Prepared, TaskWarning, TrainingTask
from shardyard_trainer.tasks.ingredients import Ingredients

_MODEL = "spec.model"
MOST_HELD_OUT = 0.5
"""As `EvaluationPolicy.holdout` allows."""

_SPELLED = {"sequence_length": "max_length", "max_source_length": "max_length"}
"""Settings whose names differ between a folder and the spec."""

_OF_DATA = frozenset({"scheme"})
"""Settings about how data is written: they are detected from the data itself."""

_OF_TRAINING = frozenset(
    {"HISTORIES_CUT", "MANY_LABELS", "NO_TEXT_HAS_TWO_LABELS", "SAME_DATA", "SHORT_HISTORIES", "TEST_DATA_TRAINED_ON"}
)
"""Warnings that do not matter if nothing is trained."""


class ModelEvaluation:
    """The task `model_evaluation`. The roles of its data are those of the model's own task."""

    name = "model_evaluation"
    output = Output.METRICS
    roles: tuple[str, ...] = ()


TASK = ModelEvaluation()


class Measured(NamedTuple):
    """A model's own task with the data, the spec of a corresponding training, and the warnings."""

    task: Prepared
    spec: spec_pb2.JobSpec
    warnings: list[TaskWarning]


def prepare_evaluation(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> Measured:
    """Reads model and data of a spec, resolved or not.

    Raises SpecError, all at once: TASK_MISMATCH for a model without a head, LABEL_MISMATCH for labels that it does not
    have.
    """
    choice, task = look(spec, locations)
    described = choice.described
    assert described is not None
    data_field = f"{table.path_of(spec)}.data"
    own = _own_spec(spec, described, task)
    job = Ingredients(own, locations, only_evaluates=True)
    try:
        prepared = task.prepare(job)
    except SpecError as error:
        raise _mismatch(own, described, locations, data_field) or _said_here(error, job.field, data_field) from error
    starts_anew = next((each for each in prepared.warnings if each.reason == "NEW_HEAD"), None)
    if starts_anew is not None:
        what = starts_anew.message.partition(": a new")[0]
        message = f"{what}, so there is nothing to measure; fine-tune the model first, or name one with a head"
        raise _mismatch(own, described, locations, data_field) or SpecError(_MODEL, "TASK_MISMATCH", message)
    found = (
        each._replace(field=_here(each.field, job.field, data_field))
        for each in prepared.warnings
        if each.reason not in _OF_TRAINING
    )
    return Measured(prepared, own, list(dict.fromkeys(found)))


def look(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> tuple[ModelChoice, TrainingTask]:
    """The model with its folder described, and the task that its head is for. Raises SpecError."""
    if spec.model.WhichOneof("source") == "architecture":
        message = "a fresh model knows nothing that could be measured; name a trained one"
        raise SpecError(f"{_MODEL}.architecture", "SPEC_INVALID", message)
    choice = sources.choose_model(spec.model, locations)
    described = choice.described
    assert described is not None
    try:
        task = table.of_folder(described)
    except FolderInvalid as error:
        raise SpecError(choice.field, error.reason, str(error), error.metadata) from None
    if task is None:
        what = described.reshaped or "it is a bare backbone without a head"
        message = f"{what}, so there is nothing to measure; fine-tune the model first, or name one with a head"
        raise SpecError(choice.field, "TASK_MISMATCH", message)
    return choice, task


def _own_spec(spec: spec_pb2.JobSpec, described: ModelFolder, task: TrainingTask) -> spec_pb2.JobSpec:
    """The spec of the model's own task, with the settings of its folder and the data to evaluate on."""
    own = spec_pb2.JobSpec(model=spec.model)
    own.optimization.seed = spec.optimization.seed
    message: Any = own
    for name in next(path for path in task_paths() if path[-1] == task.name):
        message = getattr(message, name)
        message.SetInParent()
    _recall(message, described)
    data = table.message_of(spec).data
    own.train_data.CopyFrom(data)
    # A task with a split of its own chooses the evaluated part of the data; any other task evaluates all of it.
    if "split" not in message.DESCRIPTOR.fields_by_name:
        own.eval_data.CopyFrom(data)
    elif isinstance(share := described.trained.get("holdout"), float) and 0 < share <= MOST_HELD_OUT:
        own.evaluation.holdout = share
    return own


def _recall(message: Any, described: ModelFolder) -> None:
    """Fills the task's own message with the folder's settings. Raises SpecError for values of another kind."""
    known = {**described.trained, "problem": described.problem, "labels": list(_named_labels(described))}
    for field in message.DESCRIPTOR.fields:
        value = known.get(_SPELLED.get(field.name, field.name))
        if field.name in _OF_DATA or value in (None, "", []):
            continue
        try:
            _set(message, field, value)
        except (TypeError, ValueError, AttributeError):
            text = f"shardyard.json has the {field.name} {str(value)[:100]!r}, which is not a valid value"
            raise SpecError(_MODEL, "MODEL_INVALID", f"{text}; take the folder as exported") from None


def _set(message: Any, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.enum_type is not None:
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        if (known := field.enum_type.values_by_name.get(f"{prefix}{value.upper()}")) is not None:
            setattr(message, field.name, known.number)
    elif field.message_type is None:
        setattr(message, field.name, value)


def _named_labels(described: ModelFolder) -> tuple[str, ...]:
    """The head's labels; empty if they only have the default names of transformers."""
    return () if all(label.startswith("LABEL_") for label in described.labels) else described.labels


def _mismatch(
    own: spec_pb2.JobSpec, described: ModelFolder, locations: worker_pb2.Locations, data_field: str
) -> SpecError | None:
    """The error for data with labels that the model does not have; None if that is not the problem."""
    if not described.labels:
        return None
    free = spec_pb2.JobSpec()
    free.CopyFrom(own)
    message = table.message_of(free)
    names = message.DESCRIPTOR.fields_by_name
    if "new_head" in names:
        message.new_head = True
    if "labels" in names:
        del message.labels[:]
    try:
        found = table.trained(free).prepare(Ingredients(free, locations, only_evaluates=True))
    except SpecError:
        return None
    theirs, ours = described.labels, tuple(found.describe().get("labels") or ())
    strange = [label for label in ours if label not in theirs]
    is_generic = not _named_labels(described)
    if not ours or (len(ours) == len(theirs) if is_generic else not strange):
        return None
    what = (
        f"the model has {len(theirs)} labels ({listed(theirs, most=8)}), the data {len(ours)} ({listed(ours, most=8)})"
    )
    unknown = "" if is_generic else f", of which the model does not know {listed(strange, most=8)}"
    text = f"{what}{unknown}; measure it on data with its labels, or fine-tune it to those of the data"
    return SpecError(
        data_field, "LABEL_MISMATCH", text, {"model_labels": ",".join(theirs), "data_labels": ",".join(ours)}
    )


def _said_here(error: SpecError, task_field: str, data_field: str) -> SpecError:
    """The errors of the model's own task, moved to the fields of this spec, each once."""
    found: list[SpecError] = []
    for each in error.all():
        each.others = ()
        each.field = _here(each.field, task_field, data_field)
        if not any((each.field, each.message) == (other.field, other.message) for other in found):
            found.append(each)
    found[0].others = tuple(found[1:])
    return found[0]


def _here(field: str, task_field: str, data_field: str) -> str:
    """A field of the model's own task as a field of this spec: its settings belong to the model."""
    for prefix in ("spec.train_data", "spec.eval_data"):
        if field == prefix or field.startswith(f"{prefix}."):
            return data_field + field.removeprefix(prefix)
    return _MODEL if field.startswith((task_field, "spec.tokenizer")) else field
