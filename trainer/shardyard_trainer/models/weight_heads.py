"""Which heads a folder's weights really have, found from the names and shapes of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers

from shardyard_trainer.models.door import Folder, FolderInvalid, signature
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.models.loading import LOADING_ERRORS, quiet, what_failed
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.models.weight_report import WeightReport, judge
from shardyard_trainer.models.weights import WeightsInvalid, load_pretrained, open_tensors
from shardyard_trainer.plain_words import in_plain_words


def auto_class(auto: str) -> Any:
    """Transformers' class of a name such as `AutoModelForMaskedLM`; empty: the backbone's."""
    return getattr(transformers, auto or "AutoModel")


def look(folder: Folder, auto: str) -> WeightReport:
    """What transformers' class `auto` (empty: the backbone alone) would take of the weights, without reading them.

    A class that the architecture does not have lacks everything of its head. Raises FolderInvalid.
    """
    return _look(folder, auto, signature(folder.path))


@functools.lru_cache(maxsize=256)
def _look(folder: Folder, auto: str, _signature: object) -> WeightReport:
    config: Any = None
    kind = auto_class(auto)
    try:
        with quiet():
            config = model_config(folder)
            if type(config) not in kind._model_mapping:
                return WeightReport(("head",), ())
            with open_tensors(folder) as tensors:
                refuse_deep(config, len(tensors))
            model, info = load_pretrained(kind, folder, config, device_map="meta", ignore_mismatched_sizes=True)
        return judge(model, info, untied=_separate(folder, getattr(model, "all_tied_weights_keys", {})))
    except LOADING_ERRORS as error:
        if isinstance(error, FolderInvalid | WeightsInvalid):
            raise
        why = in_plain_words(error) if config is None else what_failed(error, config)[1]
        raise FolderInvalid(f"the model does not load: {why}", file="config.json") from None


def with_true_head(described: ModelFolder) -> ModelFolder:
    """A folder's description of itself, without a head that config.json names and the weights lack."""
    if described.trained or not described.auto:
        return described
    report = look(described.source, described.auto)
    return replace(described, auto="", labels=(), problem="", reshaped=report.reshaped) if report.lacking else described


def refuse_deep(config: Any, num_tensors: int) -> None:
    """Raises FolderInvalid for more layers than the weights have tensors, before they are built."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > num_tensors:
        raise FolderInvalid(
            f"config.json asks for {layers:,} layers, but the weights have {num_tensors:,} tensors", file="config.json"
        )


def _separate(folder: Folder, ties: Mapping[str, str]) -> tuple[str, ...]:
    """The weights of which the file has another tensor than of those that config.json says they are."""
    with open_tensors(folder) as tensors:
        return tuple(
            one
            for one, other in ties.items()
            if one in tensors
            and other in tensors
            and (
                tensors[one].get_shape() != tensors[other].get_shape()
                or not bool((tensors[one][:] == tensors[other][:]).all())
            )
        )
