"""Writes a stored model in another format, and measures it beside the model on data of the model's own task.

Planned by `planning.formats`, run by `training.formats`.
"""

from __future__ import annotations

from shardyard_trainer.tasks.base import Output


class ModelExport:
    """The task `model_export`. The roles of its data are those of the model's own task."""

    name = "model_export"
    output = Output.FORMAT
    roles: tuple[str, ...] = ()


TASK = ModelExport()
