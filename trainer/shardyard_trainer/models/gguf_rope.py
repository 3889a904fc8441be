"""What a GGUF file says of its rotary positions (RoPE), in the words of transformers' configurations.

transformers reads the base of the frequencies alone. What llama.cpp computes from the other settings, and from the
tensors with factors of the frequencies, is written here into `rope_scaling`; what has no equal there stays unread, and
the file is refused for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, BinaryIO

from shardyard_trainer.models.gguf_header import Header, HeaderInvalid, Value

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_LARGEST = 1e12
_BASE = 10_000.0
"""llama.cpp's base of the frequencies if a file has none."""

_PARTIAL = frozenset({"phi3", "stablelm", "nemotron"})
"""Model types whose configuration says which part of a head is rotated."""

_LLAMA3_CONTEXTS = (8192, *(2**power for power in range(5, 21)))
_LLAMA3_FACTORS = (8.0, 32.0)
_SAME = 1e-4
"""How far factors of 32 bits may be from those that they were made as, relatively."""


@dataclass
class Rotations:
    """What becomes part of the configuration, and which settings and tensors of the file that says."""

    values: dict[str, Any] = field(default_factory=dict)
    settings: set[str] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)


def rotations(header: Header, file: BinaryIO, model_type: str) -> Rotations:
    """Of a model with rotary positions. Raises HeaderInvalid for numbers that cannot be meant."""
    own = header.own()
    found = Rotations({"rope_theta": _number(own, "rope.freq_base") or _BASE}, {"rope.freq_base"})
    if model_type == "gemma3_text" and (local := _number(own, "rope.freq_base_swa")):
        found.values["rope_local_base_freq"] = local
        found.settings.add("rope.freq_base_swa")
    _add_part(own, model_type, found)
    scaling = _of_tensors(header, file, found) or _of_settings(own, model_type, found)
    if scaling:
        found.values["rope_scaling"] = scaling
    return found


def _number(own: Mapping[str, Value], name: str) -> float:
    """A setting that is a number; 0: it is not there, or is none. Raises HeaderInvalid for one that cannot be meant."""
    value = own.get(name)
    if not isinstance(value, int | float):
        return 0.0
    if not 0 <= value < _LARGEST:
        raise HeaderInvalid(f"its setting {name} is {value}, which cannot be meant")
    return float(value)


def _add_part(own: Mapping[str, Value], model_type: str, found: Rotations) -> None:
    """The part of each head that is rotated."""
    heads = _number(own, "attention.head_count")
    width = _number(own, "attention.key_length") or (_number(own, "embedding_length") // heads if heads else 0)
    rotated = _number(own, "rope.dimension_count") or width
    if model_type in _PARTIAL and width:
        found.values["partial_rotary_factor"] = rotated / width
    if model_type in _PARTIAL or rotated == width:
        found.settings.add("rope.dimension_count")


def _of_settings(own: Mapping[str, Value], model_type: str, found: Rotations) -> dict[str, Any]:
    """Frequencies that are scaled by `rope.scaling.*`; what is not understood stays unread."""
    # As in llama.cpp: a factor without a type is a linear one, and of type none a factor means nothing.
    kind = own.get("rope.scaling.type", "linear")
    factor = _number(own, "rope.scaling.factor") or _number(own, "rope.scale_linear")
    basic = {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"}
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        found.settings |= {*basic, "rope.scaling.original_context_length"}
        return {}
    if model_type == "phi3":  # It has factors for each frequency, or none.
        return {}
    if kind == "linear":
        found.settings |= {*basic, "rope.scaling.original_context_length"}
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor < 1:
        return {}
    before = _number(own, "rope.scaling.original_context_length") or _number(own, "context_length")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(before)}
    for end in ("beta_fast", "beta_slow"):
        if value := _number(own, f"rope.scaling.yarn_{end}"):
            scaling[end] = value
            found.settings.add(f"rope.scaling.yarn_{end}")
    found.settings |= {*basic, "rope.scaling.original_context_length"}
    return scaling


def _of_tensors(header: Header, file: BinaryIO, found: Rotations) -> dict[str, Any]:
    """Frequencies that are divided by factors of their own, which the file has as tensors."""
    own = header.own()
    before = _number(own, "rope.scaling.original_context_length")
    is_scaled_too = _number(own, "rope.scaling.factor") not in (0.0, 1.0)
    if _FREQUENCIES in header.tensors and not is_scaled_too:
        factors = header.numbers(file, _FREQUENCIES)
        if set(factors) == {1.0}:
            found.tensors.add(_FREQUENCIES)
            return {}
        if scaling := _llama3(factors, found.values["rope_theta"], before):
            found.tensors.add(_FREQUENCIES)
            found.settings.add("rope.scaling.original_context_length")
            return scaling
    if {_LONG, _SHORT} <= header.tensors.keys() and before and not is_scaled_too:
        found.tensors |= {_LONG, _SHORT}
        found.settings |= {"rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.type"}
        # Phi-3 has a setting of its own for it, whose default would win.
        found.values["original_max_position_embeddings"] = int(before)
        return {
            "rope_type": "longrope",
            "long_factor": header.numbers(file, _LONG),
            "short_factor": header.numbers(file, _SHORT),
            "original_max_position_embeddings": int(before),
            "attention_factor": _number(own, "rope.scaling.attn_factor") or 1.0,
        }
    return {}


def _llama3(factors: list[float], base: float, before: float) -> dict[str, Any]:
    """The settings of Llama 3 that give just these factors; empty: none that are tried.

    The file has only the factors. Whatever gives the same ones computes the same.
    """
    contexts = (int(before) or _LLAMA3_CONTEXTS[0], *_LLAMA3_CONTEXTS)
    # The largest is the factor itself, unless no frequency is low enough.
    for context, factor in product(contexts, (max(factors), *_LLAMA3_FACTORS)):
        made = _llama3_factors(len(factors), base, factor, context)
        if all(math.isclose(one, other, rel_tol=_SAME) for one, other in zip(factors, made, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    return {}


def _llama3_factors(number: int, base: float, factor: float, context: int) -> list[float]:
    """As llama.cpp's converter writes them, for the low and high factors 1 and 4 that all models of Meta have."""
    found = []
    for index in range(number):
        turns = context / (2 * math.pi * base ** (index / number))
        if turns > 4:
            found.append(1.0)
        elif turns < 1:
            found.append(factor)
        else:
            part = (turns - 1) / 3
            found.append(1 / ((1 - part) / factor + part))
    return found
