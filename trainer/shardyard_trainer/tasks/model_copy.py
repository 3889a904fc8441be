"""Copies a stored model to an object store.

Planned by `planning.copies`. No rank runs it: the copy is made by a process that knows the store's keys
(`remote.copying`), which the coordinator asks.
"""

from __future__ import annotations

from shardyard_trainer.tasks.base import Output


class ModelCopy:
    """The task `model_copy`. It has no data."""

    name = "model_copy"
    output = Output.COPY
    roles: tuple[str, ...] = ()


TASK = ModelCopy()
