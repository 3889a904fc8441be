"""Configurations of fresh models: an architecture's own, with the overrides of the spec, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers
from google.protobuf import json_format
from huggingface_hub.errors import StrictDataclassError

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError, nearest, raise_all, shorten
from shardyard_trainer.models import architectures
from shardyard_trainer.models.bounds import experts_complaint, too_large
from shardyard_trainer.models.loading import FIXED_SETTINGS, LOADING_ERRORS, quiet, what_failed
from shardyard_trainer.plain_words import in_plain_words

SPECIAL_ROLES = ("pad", "bos", "eos", "cls", "sep")
"""Tokens that a configuration may name."""

_NEVER_OVERRIDDEN: Mapping[str, str] = {
    "model_type": "give it as architecture.model_type",
    "transformers_version": "it is that of the transformers in use; leave it out",
    "dtype": "it comes from optimization.precision; leave it out",
    "auto_map": "no code of a model's own is ever run; leave it out",
}
_COUNTS = frozenset(
    {
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "n_inner",
        "max_position_embeddings",
        "type_vocab_size",
        "sliding_window",
    }
)
"""Settings of at least 1, by their canonical names, unless the architecture's own value is less."""

_HEAD_SETTINGS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")


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
    try:
        default = kind()
    except LOADING_ERRORS as error:
        raise SpecError(
            f"{field}.model_type",
            "SPEC_INVALID",
            f"{wanted.model_type} has no default configuration: {in_plain_words(error)}",
        ) from None
    overrides = _checked_overrides(json_format.MessageToDict(wanted.overrides), default, f"{field}.overrides")
    if (over := too_large(overrides)) is not None:
        raise SpecError(f"{field}.overrides.{over.name}", "MODEL_DOES_NOT_FIT", over.message)
    try:
        with quiet():
            config = kind(**overrides)
        # A few architectures have two backbones, and transformers looks here for the one that is meant.
        config.architectures = config.architectures or []
    except LOADING_ERRORS as error:
        raise SpecError(
            f"{field}.overrides", "SPEC_INVALID", f"refused by {wanted.model_type}: {in_plain_words(error)}"
        ) from None
    _check_heads(config, overrides, f"{field}.overrides")
    if (found := experts_complaint(config.to_dict())) is not None:
        raise SpecError(f"{field}.overrides.{found[0]}", "SPEC_INVALID", found[1])
    return config, overrides


def fit_config(
    config: Any,
    overrides: Mapping[str, Any],
    *,
    vocab_size: int,
    special: Mapping[str, int | None],
    length: int,
    field: str,
) -> None:
    """Makes a fresh configuration fit its input: the number of tokens, those of `special` by their roles, and positions
    for `length` of them unless the overrides say how many. Raises SpecError if no model can be made of it.
    """
    config.vocab_size = vocab_size
    for role in SPECIAL_ROLES:
        if hasattr(config, f"{role}_token_id"):
            # A configuration that must have such a token keeps its own.
            with suppress(TypeError, StrictDataclassError):
                setattr(config, f"{role}_token_id", special.get(role))
    if architectures.is_seq2seq(config):
        _fit_decoder(config, overrides, vocab_size=vocab_size, special=special)
    sets_positions = "max_position_embeddings" in canonical_names(config, overrides)
    if not sets_positions and architectures.longest(config) is not None:
        config.max_position_embeddings = length + architectures.position_offset(config)
    check_builds(config, field)


def _fit_decoder(
    config: Any, overrides: Mapping[str, Any], *, vocab_size: int, special: Mapping[str, int | None]
) -> None:
    if "decoder_start_token_id" not in overrides:
        config.decoder_start_token_id = architectures.decoder_start(config, special)
    if getattr(config, "forced_eos_token_id", None) is not None:
        config.forced_eos_token_id = special.get("eos")
    if hasattr(config, "decoder_vocab_size"):
        config.decoder_vocab_size = vocab_size


def check_builds(config: Any, field: str) -> None:
    """Raises SpecError if no model can be made of a configuration."""
    try:
        with quiet(), torch.device("meta"):
            transformers.AutoModel.from_config(config)
    except LOADING_ERRORS as error:
        name, why = what_failed(error, config)
        raise SpecError(
            f"{field}.overrides.{name}".removesuffix("."),
            "SPEC_INVALID",
            f"no {config.model_type} can be made so: {why}",
        ) from None


def check_token_ids(overrides: Mapping[str, Any], vocab_size: int, field: str) -> None:
    """Raises SpecError for every token id among the overrides that the vocabulary does not have."""
    raise_all(
        SpecError(
            f"{field}.{name}",
            "SPEC_INVALID",
            f"{value} is not an id of the vocabulary, which has 0 to {vocab_size - 1:,}; leave it out, and it is the "
            "tokenizer's",
        )
        for name, value in overrides.items()
        if name.endswith("_token_id") and _is_number(value) and not 0 <= value < vocab_size
    )


def canonical_names(config: Any, overrides: Mapping[str, Any]) -> set[str]:
    """The names of overrides as transformers has them in common: GPT-2's `n_positions` is `max_position_embeddings`."""
    own = {value: name for name, value in config.attribute_map.items()}
    return {own.get(name, name) for name in overrides}


def _checked_overrides(given: Mapping[str, Any], default: Any, field: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    errors: list[SpecError] = []
    for name, value in sorted(given.items()):
        after = _as_meant(value, _setting(default, name))
        if complaint := _name_complaint(name, default) or _value_complaint(name, after, default):
            errors.append(SpecError(f"{field}.{shorten(name)}", "SPEC_INVALID", complaint))
        checked[name] = after
    raise_all(errors)
    return checked


def _setting(config: Any, name: str) -> Any:
    """A setting's value, None if it has none for the whole model: some differ by layer, and are then not to be had."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _as_meant(value: Any, before: Any) -> Any:
    # Struct knows one kind of number: an integer is one again if it is whole and nothing else is meant.
    if isinstance(value, list):
        inner = before[0] if isinstance(before, list) and before else None
        return [_as_meant(each, inner) for each in value]
    if isinstance(value, dict):
        known = before if isinstance(before, dict) else {}
        return {name: _as_meant(each, known.get(name)) for name, each in value.items()}
    is_whole = isinstance(value, float) and value.is_integer() and not isinstance(before, float | bool)
    return int(value) if is_whole else value


def _name_complaint(name: str, default: Any) -> str:
    if name in _NEVER_OVERRIDDEN:
        return f"{name} cannot be overridden: {_NEVER_OVERRIDDEN[name]}"
    known = {*default.to_dict(), *default.attribute_map} - set(_NEVER_OVERRIDDEN)
    # Those of an underscore are transformers' own notes, of places among them.
    known = {each for each in known if not each.startswith("_")}
    return "" if name in known else f"{default.model_type} has no such setting{nearest(name, known)}"


def _value_complaint(name: str, value: Any, default: Any) -> str:
    """The error of an override's value that the architecture itself does not check; empty if there is none."""
    before, shown = _setting(default, name), _shown(value)
    if isinstance(before, bool | int | float | str) and not _same_kind(before, value):
        return f"{shown} is no {type(before).__name__}, as {before} is"
    if name in FIXED_SETTINGS and value != FIXED_SETTINGS[name]:
        return f"{shown}: training needs {_shown(FIXED_SETTINGS[name])}; leave it out"
    if not _is_number(value) or value == before:
        return ""
    if default.attribute_map.get(name, name) in _own_names(default, _COUNTS) and value < 1:
        return f"{shown}: at least 1"
    return number_complaint(name, value)


def number_complaint(name: str, value: Any) -> str:
    """The error of a dropout, an epsilon or an initial spread; empty: none, or it is another setting."""
    if not _is_number(value):
        return ""
    shown = _shown(value)
    if ("dropout" in name or name.endswith(("pdrop", "layerdrop"))) and not 0 <= value < 1:
        return f"{shown} is not a dropout probability; give 0 or more and less than 1"
    if name.endswith(("_eps", "_epsilon")) and not 0 < value < math.inf:
        return f"{shown} must be over 0, such as 1e-5: what is divided by it would not be finite"
    if name.endswith("initializer_range") and not 0 <= value < math.inf:
        return f"{shown} is not a standard deviation; give 0 or more, such as 0.02"
    return ""


def _own_names(default: Any, names: Iterable[str]) -> set[str]:
    """The names under which an architecture has settings, from their canonical ones."""
    return {default.attribute_map.get(name, name) for name in names}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as one would write it in JSON."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else shorten(str(value))


def _same_kind(before: Any, after: Any) -> bool:
    if isinstance(before, bool) or isinstance(after, bool):
        return isinstance(before, bool) and isinstance(after, bool)
    if isinstance(before, float):
        return isinstance(after, int | float) and math.isfinite(after)
    return isinstance(after, type(before))


def _check_heads(config: Any, overrides: Mapping[str, Any], field: str) -> None:
    """Raises SpecError if heads cannot share keys and values, or cannot be rotated; a forward pass would fail later."""
    settings = config.to_dict()
    names = [config.attribute_map.get(name, name) for name in _HEAD_SETTINGS]
    numbers = [value if isinstance(value := settings.get(name), int) else 0 for name in names]
    heads, shared, head_dim, width = numbers
    if heads < 1:
        return
    if shared > 0 and heads % shared:
        raise SpecError(
            f"{field}.{_first_of(overrides, names[1], names[0])}",
            "SPEC_INVALID",
            f"{heads} attention heads cannot share {shared} key-value heads evenly; "
            f"give a {names[1]} that divides {heads}, such as {math.gcd(heads, shared)}",
        )
    size, rotation = head_dim or width // heads, settings.get("rope_parameters")
    is_whole = isinstance(rotation, dict) and "partial_rotary_factor" not in {*settings, *rotation}
    if is_whole and size % 2 and set(names) & set(overrides):
        raise SpecError(
            f"{field}.{_first_of(overrides, *names[2:], names[0])}",
            "SPEC_INVALID",
            f"heads of {size} values, which are rotated in pairs; give a head_dim, or hidden_size / "
            "num_attention_heads, that is even",
        )


def _first_of(overrides: Mapping[str, Any], *names: str) -> str:
    return next((name for name in names if name in overrides), names[0])
