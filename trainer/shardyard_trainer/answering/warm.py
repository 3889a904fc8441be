"""Models that stay loaded between calls, within a memory budget: the least recently used ones go first.

The key of a model is its folder and the identity of the folder's files: a changed file makes another model.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

from shardyard.v1 import transfer_pb2
from shardyard_trainer.models.door import Folder, signature
from shardyard_trainer.models.known_files import check_known
from shardyard_trainer.tasks.opening import Opened, open_model

BUDGET_VARIABLE = "SHARDYARD_MODEL_CACHE_BYTES"
DEFAULT_BUDGET_BYTES = 2 * 1024**3

Signature = tuple[tuple[str, int, int, int, int], ...]


class ModelCache:
    """Loads a model on its first request. Not thread-safe: a process answers in one thread."""

    def __init__(self, load: Callable[[Folder], Opened], *, budget_bytes: int) -> None:
        self._load = load
        self._budget_bytes = budget_bytes
        self._models: OrderedDict[tuple[Folder, Signature], Opened] = OrderedDict()

    def get(self, source: Folder, known: Sequence[transfer_pb2.StoredFile] = ()) -> Opened:
        """The model of a folder. Raises FolderInvalid, MODEL_CHANGED for a file that is not as `known`.

        The bytes are compared when the model is loaded, and again once size or time of a file have changed.
        """
        key = (source, signature(source.path))
        if key in self._models:
            self._models.move_to_end(key)
            return self._models[key]
        for stale in [other for other in self._models if other[0] == source]:
            del self._models[stale]
        check_known(source, known)
        model = self._load(source)
        self._models[key] = model
        # The newest stays, however large it is: a request is waiting for it.
        while len(self._models) > 1 and self.held_bytes > self._budget_bytes:
            self._models.popitem(last=False)
        return model

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights of all loaded models."""
        return sum(model.loaded.size_bytes for model in self._models.values())


def shared_cache() -> ModelCache:
    """The cache of this process."""
    return _SHARED


_SHARED = ModelCache(open_model, budget_bytes=int(os.environ.get(BUDGET_VARIABLE, DEFAULT_BUDGET_BYTES)))
