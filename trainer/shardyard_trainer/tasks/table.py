"""Every task by its name; the only place that lists them.

A task's name is its member of the spec's oneofs, its file in this package, and `Model.task`: nothing else has to agree.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, cast

from google.protobuf.descriptor import Descriptor

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.tasks.base import Output, Task, TrainingTask

NAMES = (
    "causal_lm",
    "masked_lm",
    "text_classification",
    "token_classification",
    "image_classification",
    "recommendation",
    "feature_extraction",
)
"""The tasks, each the name of its module."""


def named(name: str) -> Task:
    """The task of a name. Raises KeyError."""
    if name not in NAMES:
        raise KeyError(name)
    return cast("Task", importlib.import_module(f"shardyard_trainer.tasks.{name}").TASK)


def of(spec: spec_pb2.JobSpec) -> Task:
    """The task of a spec. Raises SpecError if none is given."""
    return named(path_of(spec).rpartition(".")[2])


def path_of(spec: spec_pb2.JobSpec) -> str:
    """Where a spec has its task's own message, such as `spec.pretraining.causal_lm`. Raises SpecError."""
    return _descend(spec)[0]


def message_of(spec: spec_pb2.JobSpec) -> Any:
    """The task's own message in a spec, to read and to fill in. Raises SpecError."""
    return _descend(spec)[1]


def of_folder(described: ModelFolder) -> TrainingTask | None:
    """The task that a folder has a head for; None for a bare backbone. Raises FolderInvalid for an unknown task."""
    if not described.task and not described.auto:
        return None
    tasks = [cast("TrainingTask", task) for task in map(named, NAMES) if task.output is Output.MODEL]
    if not described.task:
        return next((task for task in tasks if task.auto == described.auto), None)
    for task in tasks:
        if task.name == described.task:
            return task
    raise FolderInvalid(f"shardyard.json names an unknown task: {described.task[:100]!r}", file="shardyard.json")


def leaves() -> Iterator[str]:
    """The paths of all tasks in a spec, from its descriptor."""
    yield from _leaves(spec_pb2.JobSpec.DESCRIPTOR, "spec", "task")


def _descend(spec: spec_pb2.JobSpec) -> tuple[str, Any]:
    path, choice = "spec", "task"
    message: Any = spec
    while choice:
        member = message.WhichOneof(choice)
        if member is None:
            what = "no training task: give pretraining or fine_tuning, and what to train for"
            raise SpecError(path if path != "spec" else "spec.task", "SPEC_INVALID", what)
        path, message = f"{path}.{member}", getattr(message, member)
        choice = choice_of(message.DESCRIPTOR)
    return path, message


def choice_of(message: Descriptor) -> str:
    """The oneof that selects one task of a family; empty if the message is a task's own."""
    for choice in message.oneofs:
        # A field with presence is a synthetic oneof, named after the field.
        if not choice.name.startswith("_") and all(field.message_type for field in choice.fields):
            return str(choice.name)
    return ""


def _leaves(message: Descriptor, path: str, choice: str) -> Iterator[str]:
    for field in message.oneofs_by_name[choice].fields:
        below = choice_of(field.message_type)
        if below:
            yield from _leaves(field.message_type, f"{path}.{field.name}", below)
        else:
            yield f"{path}.{field.name}"
