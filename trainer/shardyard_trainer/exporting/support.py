"""Which models can be written in which formats, before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from shardyard.export_formats import word_of
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError, listed, nearest, shorten
from shardyard_trainer.models import architectures
from shardyard_trainer.models.folder import TORCH_HUB_TYPES
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Exportable, Output, Prepared, TrainingTask

PACKAGES = {
    spec_pb2.EXPORT_FORMAT_ONNX: ("onnx", "onnxruntime"),
    spec_pb2.EXPORT_FORMAT_ONNX_INT8: ("onnx", "onnxruntime"),
    spec_pb2.EXPORT_FORMAT_BF16: (),
}
"""What each format needs beside the trainer's own packages."""

WORKS = "bf16"


def refusals(task: TrainingTask, config: Any, formats: Sequence[int], *, field: str) -> Iterator[SpecError]:
    """Why a model of this task and configuration cannot be written in these formats; nothing: it can."""
    if not isinstance(task, Exportable):
        text = f"{task.name} models are not written in other formats; those of {_those_that_are()} are"
        yield SpecError(field, "OBJECTIVE_UNSUPPORTED", text)
    elif config.model_type in TORCH_HUB_TYPES:
        text = "a module of PyTorch Hub is code of its own, and is not written in other formats; models of transformers"
        yield SpecError(field, "OBJECTIVE_UNSUPPORTED", f"{text} are")
    elif architectures.is_seq2seq(config):
        text = f"this {config.model_type} is an encoder with a decoder, which is not written in other formats; encoders"
        yield SpecError(field, "OBJECTIVE_UNSUPPORTED", f"{text} such as bert, and causal models such as gpt2, are")
    for each in formats:
        missing = [name for name in PACKAGES[each] if importlib.util.find_spec(name) is None]  # type: ignore[index]
        if missing:
            text = f"{word_of(each)} needs {listed(missing)}, which the workers do not have"
            message = f'{text}; have the operator install them there (pip install "shardyard[export]"), or take {WORKS}'
            yield SpecError(field, "SPEC_INVALID", message)


def compared_metric(task: Prepared, wanted: str, *, field: str) -> str:
    """The metric by which a format is judged: as given, else the task's first after the loss. Raises SpecError."""
    known = task.metrics().directions()
    if wanted and wanted not in known:
        message = (
            f"{shorten(wanted)!r} is not a metric of this {task.task.name}, which has {', '.join(known)}"
            f"{nearest(wanted, known)}"
        )
        raise SpecError(field, "SPEC_INVALID", message, {"supported": ", ".join(known)})
    return wanted or next((name for name in known if name != "loss"), "loss")


def _those_that_are() -> str:
    tasks = [table.named(name) for name in table.NAMES]
    return listed(
        [each.name for each in tasks if each.output is Output.MODEL and isinstance(each, Exportable)], most=20
    )
