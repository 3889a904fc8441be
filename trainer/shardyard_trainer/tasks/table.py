"""Every task by its name; the only place that lists them.

A task's name is its member of the spec's oneofs, its file in this package, and `Model.task`: nothing else has to agree.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from shardyard.task_paths import Leaf, leaf_of
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.tasks.base import Explainable, Output, Task, TrainingTask

NAMES = (
    "causal_lm",
    "masked_lm",
    "masked_item",
    "text_classification",
    "token_classification",
    "image_classification",
    "masked_image",
    "recommendation",
    "question_answering",
    "instruction",
    "preference",
    "sentence_embedding",
    "reranking",
    "translation",
    "summarization",
    "span_corruption",
    "feature_extraction",
    "model_evaluation",
    "model_export",
    "model_copy",
)
"""The tasks, each the name of its module."""


def named(name: str) -> Task:
    """The task of a name. Raises KeyError."""
    if name not in NAMES:
        raise KeyError(name)
    return cast("Task", importlib.import_module(f"shardyard_trainer.tasks.{name}").TASK)


def of(spec: spec_pb2.JobSpec) -> Task:
    """The task of a spec. Raises SpecError if none is given."""
    return named(_leaf(spec).members[-1])


def trained(spec: spec_pb2.JobSpec) -> TrainingTask:
    """The task of a spec that leaves a model. Raises SpecError if none is given."""
    return cast("TrainingTask", of(spec))


def path_of(spec: spec_pb2.JobSpec) -> str:
    """Where a spec has its task's own message, such as `spec.pretraining.causal_lm`. Raises SpecError."""
    return _path(_leaf(spec))


def message_of(spec: spec_pb2.JobSpec) -> Any:
    """The task's own message in a spec, to read and to fill in. Raises SpecError."""
    return _leaf(spec).message


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


def explainable() -> dict[str, str]:
    """The tasks whose models' answers can be explained, each with what has a share in an answer."""
    tasks = {name: named(name) for name in NAMES}
    return {name: task.explains for name, task in tasks.items() if isinstance(task, Explainable)}


def _leaf(spec: spec_pb2.JobSpec) -> Leaf:
    leaf = leaf_of(spec)
    if leaf.missing:
        what = "no training task: give pretraining or fine_tuning, and what to train for"
        raise SpecError(_path(leaf) if leaf.members else "spec.task", "SPEC_INVALID", what)
    return leaf


def _path(leaf: Leaf) -> str:
    return ".".join(("spec", *leaf.members))
