"""The configuration of a GGUF file: what transformers reads of its header, completed and compared with the rest of it.

transformers takes the settings in its table and lets the others go, and what the file does not say gets the default of
a class, which is that of one published model. Here every setting that GGUF knows for an architecture is part of the
configuration, or changes nothing, or the file is refused for it by name; others are named in a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.models.bounds import too_large
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.gguf_header import Header, HeaderInvalid, Value
from shardyard_trainer.models.gguf_rope import Rotations, rotations

_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_NORMS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
_PLACES: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "feed_forward_length": ("intermediate_size", "d_ff", "n_inner"),
    "decoder_block_count": ("num_decoder_layers",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim", "d_kv"),
    "attention.layer_norm_epsilon": _NORMS,
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", *_NORMS),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
"""Where a setting belongs if transformers' own table has no place for it that the class knows: the first it knows."""

_OF_SHAPES = frozenset(
    {
        *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("decoder_block_count", "attention.head_count_kv", "attention.key_length", "expert_shared_count"),
        *("tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "ssm.group_count"),
    }
)
"""Settings that change nothing if the tensors have the shapes that the configuration asks for."""

_SLIDING = frozenset({"phi3", "mistral", "starcoder2", "gemma2", "gemma3_text", "gpt_oss"})
"""Model types whose configuration says by its window alone what the layers do."""

_SOFTMAX = 1
_LARGE_GEMMAS = {"gemma2": 46, "gemma3_text": 62}
"""The numbers of layers of the Gemmas of 27 billion weights, by which llama.cpp knows them."""

_RENAMED = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
_NEEDED = ("block_count", "embedding_length")
_ABSENT: Any = object()


@dataclass(frozen=True)
class Read:
    """A file's configuration, the tensors that are part of it, and what has to be said about it."""

    config: Any
    tensors: frozenset[str]
    notes: tuple[str, ...]


def configuration(links: Path, header: Header, file: BinaryIO, name: str) -> Read:
    """The configuration of the open file in the folder `links`. Raises FolderInvalid, and transformers' errors."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    given = {"gguf_file": "model.gguf", "local_files_only": True}
    made, _ = PretrainedConfig.get_config_dict(links, **given)
    own, model_type = header.own(), str(made["model_type"])
    blank = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
    ours: dict[str, Any] = {}
    turned = Rotations()
    if (taken := _taken_by_reader(links, header)) is None:
        _refuse_incomplete(header, name)
        taken, ours = _completed(header, made, blank)
        if hasattr(blank, "rope_parameters"):
            turned = _rotations(header, file, model_type, name)
            if "attention.key_length" in own and not hasattr(blank, "rotary_dim"):
                # Then the rotated part of a head need not be the whole of it.
                taken.discard("rope.dimension_count")
    # The tokens may be fewer than the rows of the table.
    if (table := header.tensors.get("token_embd.weight")) is not None:
        ours["vocab_size"] = table.shape[0]
    values = {**made, **ours, **turned.values}
    if (over := too_large(values)) is not None:
        raise FolderInvalid(f"{name} cannot be converted: {over.message}", file=name)
    config = AutoConfig.for_model(**values)
    left = {key: value for key, value in own.items() if key not in taken | turned.settings}
    left |= {key: own[key] for key, place in _placed(own, ours, taken) if getattr(config, place, None) != own[key]}
    if "rope_scaling" in turned.values and not _has_scaling(config, turned.values["rope_scaling"]):
        left |= {key: value for key, value in own.items() if key.startswith("rope.scaling.")}
        left |= dict.fromkeys(turned.tensors, "a tensor")
    notes = _judged(left, header, name)
    return Read(config, frozenset(turned.tensors), notes)


def _rotations(header: Header, file: BinaryIO, model_type: str, name: str) -> Rotations:
    try:
        return rotations(header, file, model_type)
    except HeaderInvalid as error:
        raise FolderInvalid(f"{name} is not a GGUF model: {error}; copy it again", file=name) from None


def _taken_by_reader(links: Path, header: Header) -> set[str] | None:
    """The settings that transformers' newer reader takes; None: it does not know the architecture."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config, read_gguf_metadata

    if header.architecture not in GGUF_CONFIG_ARCHS:
        return None
    metadata, names = read_gguf_metadata(str(links / "model.gguf"))
    noted = _Noted(metadata)
    get_gguf_config(noted, names)
    return {key.removeprefix(f"{header.architecture}.") for key in noted.asked}


class _Noted(dict[str, Any]):
    """A dictionary that remembers what was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dictionary."""
        self.asked.add(key)
        return super().get(key, default)


def _refuse_incomplete(header: Header, name: str) -> None:
    """Raises FolderInvalid for a file without settings for which each class has a default of its own."""
    own, theirs = header.own(), _theirs(header)
    needed = [*_NEEDED, *(["attention.head_count"] if "attention.head_count" in theirs else [])]
    if (of_norms := [norm for norm in _EPSILONS if norm in theirs]) and not any(norm in own for norm in _EPSILONS):
        needed.append(of_norms[0])
    if lacking := [f"{header.architecture}.{key}" for key in needed if key not in own]:
        raise FolderInvalid(
            f"{name} lacks {listed(lacking)}, which a model of this kind has: it is incomplete; convert the model "
            "again, or give it as safetensors",
            file=name,
        )


def _theirs(header: Header) -> Mapping[str, str | None]:
    """transformers' own table for the architecture."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    architecture = header.architecture.removesuffix("encoder")
    return GGUF_CONFIG_MAPPING.get(_RENAMED.get(architecture, architecture)) or {}


def _completed(header: Header, made: Mapping[str, Any], blank: Any) -> tuple[set[str], dict[str, Any]]:
    """The settings that are part of the configuration, and what is added to the one that transformers made."""
    own, theirs, model_type = header.own(), _theirs(header), made["model_type"]
    taken = {key for key in own if (place := theirs.get(key)) and hasattr(blank, place)}
    # Some architectures have the same place for another setting, such as the width of Mamba.
    full = {theirs[key] for key in taken}
    ours = {
        place: own[key]
        for key in own
        if key not in taken and (place := _place(key, blank)) and place not in full and own[key] is not None
    }
    taken |= {key for key in own if _place(key, blank) in ours}
    if model_type in _SLIDING and own.get("attention.sliding_window"):
        ours["sliding_window"] = own["attention.sliding_window"]
        taken.add("attention.sliding_window")
    if model_type in _LARGE_GEMMAS and (scale := _query_scale(own, model_type)):
        ours["query_pre_attn_scalar"] = scale
        taken.add("attention.scale")
    if own.get("use_parallel_residual", _ABSENT) is made.get("use_parallel_residual"):
        taken.add("use_parallel_residual")
    if hasattr(blank, "num_key_value_heads") and "attention.head_count_kv" not in own:
        ours["num_key_value_heads"] = own.get("attention.head_count")
    if model_type in ("t5", "umt5"):
        # transformers takes all for gated ones, and lets them keep the other activation.
        is_gated = "enc.blk.0.ffn_gate.weight" in header.tensors
        ours |= {"is_gated_act": is_gated, "feed_forward_proj": "gated-gelu" if is_gated else "relu"}
    else:
        # Else they would be those of the model that the class was written for.
        ours |= {role: None for role in ("bos_token_id", "eos_token_id", "pad_token_id") if role not in made}
    return taken, ours


def _place(key: str, blank: Any) -> str:
    return next((place for place in _PLACES.get(key, ()) if hasattr(blank, place)), "")


def _placed(own: Mapping[str, Value], ours: Mapping[str, Any], taken: set[str]) -> Iterator[tuple[str, str]]:
    """The settings that were put into the configuration here: their key, and their name there."""
    for key in own.keys() & taken:
        for place in _PLACES.get(key, ()):
            if place in ours:
                yield key, place


def _query_scale(own: Mapping[str, Value], model_type: str) -> int:
    """What a Gemma divides its queries by the root of, as llama.cpp computes it: files do not say it."""
    scale, width = own.get("attention.scale"), own.get("attention.key_length")
    if isinstance(scale, float) and scale > 0:
        return round(scale**-2)
    hidden, heads = own.get("embedding_length"), own.get("attention.head_count")
    if own.get("block_count") == _LARGE_GEMMAS[model_type] and isinstance(hidden, int) and isinstance(heads, int):
        return hidden // max(heads, 1)
    return width if isinstance(width, int) else 0


def _has_scaling(config: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether the class kept what was given to it."""
    found = config.rope_parameters
    found = found.get("full_attention", found)
    return all(found.get(key) == value for key, value in wanted.items())


def _judged(left: Mapping[str, Value], header: Header, name: str) -> tuple[str, ...]:
    """What to say about settings without a place. Raises FolderInvalid if any of them changes what is computed."""
    known = _known_settings()
    said = {key: value for key, value in left.items() if not _says_nothing(key, value, header)}
    if refused := sorted(key for key in said if key in known or key.startswith("rope")):
        shown = listed([f"{header.architecture}.{key} = {shorten(str(said[key]))}" for key in refused], most=3)
        raise FolderInvalid(
            f"{name} has {shown}, which changes what the model computes and is not read from GGUF files of this kind; "
            "give the model that it was made from, as safetensors",
            file=name,
            setting=f"{header.architecture}.{refused[0]}",
        )
    if not said:
        return ()
    return (f"settings that are not known were not read: {listed([f'{header.architecture}.{key}' for key in said])}",)


def _says_nothing(key: str, value: Value, header: Header) -> bool:
    """Whether a setting is one that a model without it computes the same as."""
    own = header.own()
    if key == "attention.causal":
        return value is True
    if key == "attention.value_length":
        return value == own.get("attention.key_length", value)
    if key in _EPSILONS:
        # Of T5 files have both names.
        return value == next((own[other] for other in _EPSILONS if other != key and other in own), None)
    if key == "expert_gating_func":
        return value == _SOFTMAX
    if key == "attention.sliding_window" and isinstance(value, int):
        context = own.get("context_length")
        return value == 0 or (isinstance(context, int) and value >= context)
    if key.endswith(("scale", "factor")) and value == 1:
        return True
    return key in _OF_SHAPES or value in (0, False, "", "none", ())


def _known_settings() -> frozenset[str]:
    """Those that the library of GGUF has a name for, of any architecture."""
    from gguf.constants import Keys

    names = (name for group in vars(Keys).values() if isinstance(group, type) for name in vars(group).values())
    start = "{arch}."
    return frozenset(name.removeprefix(start) for name in names if isinstance(name, str) and name.startswith(start))
