"""Configurations of fresh models: an architecture's own, with the overrides of the spec, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from google.protobuf import json_format

from shardyard.v1 import spec_pb2
from shardyard_trainer import architectures
from shardyard_trainer.data.errors import SpecError, nearest, raise_all, shorten
from shardyard_trainer.loading import LOADING_ERRORS, one_line, quiet

_MOST_LAYERS = 10_000


def fresh_config(wanted: spec_pb2.Architecture, field: str) -> tuple[Any, dict[str, Any]]:
    """The configuration that an architecture asks for, and its checked overrides. Raises SpecError."""
    known = architectures.known_types()
    if wanted.model_type not in known:
        raise SpecError(
            f"{field}.model_type",
            "SPEC_INVALID",
            f"transformers has no model type {shorten(wanted.model_type)!r}{nearest(wanted.model_type, known)}",
        )
    kind = transformers.CONFIG_MAPPING[wanted.model_type]
    default = kind()
    overrides = _checked_overrides(json_format.MessageToDict(wanted.overrides), default, f"{field}.overrides")
    try:
        with quiet():
            config = kind(**overrides)
    except LOADING_ERRORS as error:
        raise SpecError(
            f"{field}.overrides", "SPEC_INVALID", f"refused by {wanted.model_type}: {one_line(error)}"
        ) from None
    _check_sizes(config, overrides, field)
    return config, overrides


def check_builds(config: Any, field: str) -> None:
    """Raises SpecError where no model can be made of a configuration."""
    try:
        with quiet(), torch.device("meta"):
            transformers.AutoModel.from_config(config)
    except LOADING_ERRORS as error:
        raise SpecError(
            f"{field}.overrides",
            "SPEC_INVALID",
            f"no {config.model_type} can be made so: {one_line(error)}",
        ) from None


def canonical_names(config: Any, overrides: Mapping[str, Any]) -> set[str]:
    """The names of overrides as transformers has them in common: GPT-2's `n_positions` is `max_position_embeddings`."""
    own = {value: name for name, value in config.attribute_map.items()}
    return {own.get(name, name) for name in overrides}


def _checked_overrides(given: Mapping[str, Any], default: Any, field: str) -> dict[str, Any]:
    known = {**default.to_dict(), **dict.fromkeys(default.attribute_map)}
    checked: dict[str, Any] = {}
    errors: list[SpecError] = []
    for name, value in given.items():
        place = f"{field}.{shorten(name)}"
        if name not in known or name in ("model_type", "transformers_version", "dtype", "auto_map"):
            errors.append(
                SpecError(place, "SPEC_INVALID", f"{default.model_type} has no such setting{nearest(name, known)}")
            )
            continue
        before = getattr(default, name, None)
        # Struct knows one kind of number: an integer is one again where it is whole and nothing else is meant.
        whole = isinstance(value, float) and value.is_integer() and not isinstance(before, float)
        after = int(value) if whole and not isinstance(before, bool) else value
        if isinstance(before, bool | int | float | str) and not _same_kind(before, after):
            errors.append(
                SpecError(place, "SPEC_INVALID", f"{shorten(str(value))} is no {type(before).__name__}, as {before} is")
            )
            continue
        checked[name] = after
    raise_all(errors)
    return checked


def _same_kind(before: Any, after: Any) -> bool:
    if isinstance(before, bool) or isinstance(after, bool):
        return isinstance(before, bool) and isinstance(after, bool)
    if isinstance(before, float):
        return isinstance(after, int | float) and math.isfinite(after)
    return isinstance(after, type(before))


def _check_sizes(config: Any, overrides: Mapping[str, Any], field: str) -> None:
    given = canonical_names(config, overrides)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    for name in names:
        value = getattr(config, name, None)
        own = config.attribute_map.get(name, name)
        if name in given and isinstance(value, int) and value < 1:
            raise SpecError(f"{field}.overrides.{own}", "SPEC_INVALID", f"{value}: at least 1")
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        own = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise SpecError(
            f"{field}.overrides.{own}",
            "MODEL_DOES_NOT_FIT",
            f"{layers:,} layers; at most {_MOST_LAYERS:,} are planned for",
        )
