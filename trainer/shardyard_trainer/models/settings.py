"""What of a folder's config.json reaches transformers: known settings of known types.

A configuration object is made of a dictionary that was picked here. Nothing in it names a file, a class, a repository
or code: `_name_or_path`, `auto_map`, `quantization_config`, `attn_implementation` and their like are dropped, and
so is every setting that the architecture does not have.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

import transformers

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.bounds import MOST_LABELS, experts_complaint, too_large
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.folder import OWN_TYPES, TORCH_HUB_TYPES

_NEVER = frozenset(
    {
        "auto_map",
        "backbone",
        "backbone_config",
        "backbone_kwargs",
        "custom_pipelines",
        "distributed_config",
        "dtype",
        "fusion_config",
        "model_name",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "per_layer_config",
        "quantization_config",
        "return_dict",
        "timm_kwargs",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "use_kernels",
        "use_pretrained_backbone",
        "use_timm_backbone",
    }
)
"""Settings that name code, files or places, or that decide how this code calls the model; `_…` ones are internal."""

READ_BY_MODELS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("head_dim", "global_head_dim", "num_global_key_value_heads", "embedding_size", "sliding_window"),
            *("sliding_window_pattern", "sliding_window_size", "rotary_dim", "max_relative_positions"),
            *("position_buckets", "original_max_position_embeddings", "no_rope_layer_interval", "num_labels"),
            *("full_attention_interval", "first_k_dense_replace", "num_nextn_predict_layers", "num_hash_layers"),
            *("attention_chunk_size", "pooler_hidden_size", "num_experts", "num_local_experts", "conv_kernel_size"),
            *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
            *("num_key_value_heads", "attention_head_size", "dense_intermediate_size", "max_position_embeddings"),
            *(
                "linear_head_dim",
                "n_embed",
                "num_heads",
                "block_ff_dim",
                "global_attn_every_n_layers",
                "max_expected_seq_len",
                "conv_groups",
            ),
        ),
        (int,),
    ),
    **dict.fromkeys(
        (
            *("rope_theta", "rotary_pct", "rotary_emb_base", "partial_rotary_factor", "rope_local_base_freq"),
            *("local_rope_theta", "global_rope_theta", "swa_rope_theta", "initializer_range", "init_std"),
            *("initializer_cutoff_factor", "initializer_factor", "embedding_initializer_range", "hidden_dropout"),
            *("classifier_dropout", "classifier_dropout_rate", "cls_dropout", "layerdrop", "attention_dropout"),
            *("summary_first_dropout", "summary_last_dropout", "capacity_factor", "router_scale", "swiglu_limit"),
        ),
        (int, float),
    ),
    **dict.fromkeys(
        (
            *("tie_word_embeddings", "tie_last_hidden_states", "is_decoder", "is_causal", "relative_attention"),
            *("position_biased_input", "share_att_key", "use_bidirectional_attention"),
            *("use_sliding_window", "use_bias", "qkv_bias", "summary_use_proj", "summary_proj_to_labels"),
            *("add_cross_attention", "talking_head", "pre_norm", "use_cache", "scale_decoder_outputs"),
        ),
        (bool,),
    ),
    **dict.fromkeys(
        (
            *("position_embedding_type", "hidden_act", "summary_type", "summary_activation", "norm_rel_ebd"),
            "conv_act",
        ),
        (str,),
    ),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict,)),
    "layer_types": (list,),
}
"""Settings that code of transformers reads from architectures that do not declare them, or takes under an old name."""

_SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf}

_OF_LABELS = ("num_labels", "id2label", "label2id")
"""Empty ones say nothing, as if they were not there."""

_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
)

_DEEPEST = 8


def model_config(folder: Folder) -> Any:
    """The configuration object of a folder's config.json, of a model type that transformers has.

    Raises FolderInvalid for a setting of another type, and what transformers raises for values that it refuses: see
    `loading.LOADING_ERRORS`.
    """
    values = folder.read_object("config.json", what="a Hugging Face model folder has one")
    if values.get("quantization_config"):
        raise FolderInvalid(
            f"the model is quantised ({_method(values['quantization_config'])}), and its weights are not those of its "
            "architecture; use the model that it was made from, or save it dequantised",
            file="config.json",
        )
    from_hub = values.get("model_type") in TORCH_HUB_TYPES
    if from_hub:
        from shardyard_trainer.models import hub_modules  # Others do without; it registers its types.
    if home := OWN_TYPES.get(str(values.get("model_type"))):
        importlib.import_module(home).register()
    kind = transformers.CONFIG_MAPPING[str(values.get("model_type"))]
    picked = _picked(values, kind)
    if (over := too_large(picked)) is not None:
        raise FolderInvalid(f"config.json cannot be built: {over.message}", file="config.json")
    _refuse_too_small(picked, kind)
    config = kind(**picked)
    if from_hub:
        hub_modules.allow_code(config, folder, values)
    if (found := experts_complaint(config.to_dict())) is not None:
        raise FolderInvalid(f"config.json has {found[0]}: {found[1]}", file="config.json")
    return config


def plain(file: str, name: str, value: Any, *, depth: int = 0) -> Any:
    """A setting's value as it is meant. Raises FolderInvalid for one that no setting has: NaN, or nested deeply."""
    if depth > _DEEPEST:
        raise FolderInvalid(f"{file} has {name} nested more than {_DEEPEST} deep", file=file)
    if isinstance(value, float) and math.isnan(value):
        raise FolderInvalid(f"{file} has {name}: NaN, which is not a number; correct it, or leave it out", file=file)
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[value["__float__"]]  # transformers writes it so
        return {key: plain(file, name, each, depth=depth + 1) for key, each in value.items()}
    return [plain(file, name, each, depth=depth + 1) for each in value] if isinstance(value, list) else value


def _picked(values: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """The settings of a config.json that its architecture has."""
    declared = {field.name for field in dataclasses.fields(kind)}
    declared |= {*kind.attribute_map, *kind.attribute_map.values()}
    picked = {}
    for name, value in values.items():
        if name in _NEVER or name.startswith("_") or (name in _OF_LABELS and value in (None, {})):
            continue
        if name in kind.sub_configs_defaults:
            inner = kind.sub_configs_defaults[name].config_class
            # A part that chooses its own class is left at its default: models of text have none.
            if isinstance(value, dict) and issubclass(inner, transformers.PretrainedConfig):
                picked[name] = _picked(value, inner)
            continue
        if name not in declared:
            if name not in READ_BY_MODELS:
                continue
            if value is not None and not is_of(value, READ_BY_MODELS[name]):
                raise wrong_type("config.json", name, value, READ_BY_MODELS[name])
        picked[name] = plain("config.json", name, value)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(picked.get(name), dict):
            picked[name] = _rotation(picked[name])
    _check_labels(picked)
    return picked


def _refuse_too_small(picked: Mapping[str, Any], kind: Any) -> None:
    """Raises FolderInvalid for a size under 1 that is not the architecture's own: transformers would divide by it."""
    for name in _SIZES:
        for own in sorted({name, kind.attribute_map.get(name, name)}):
            value = picked.get(own)
            if type(value) is int and value < 1 and value != getattr(kind(), own, None):
                raise FolderInvalid(
                    f"config.json has {own}: {value:,}, which must be at least 1; put the config.json that the weights "
                    "were saved with beside them",
                    file="config.json",
                )


def _method(value: Any) -> str:
    return shorten(str(value.get("quant_method"))) if isinstance(value, dict) else "in an unknown way"


def _rotation(value: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and the name of a kind; models with layers of several kinds have one dictionary for each of them."""
    found = {}
    for name, each in value.items():
        if isinstance(each, dict):
            found[name] = _rotation(each)
        elif isinstance(each, int | float | list | None) or name in {"rope_type", "type"}:
            found[name] = each
    return found


def _check_labels(picked: Mapping[str, Any]) -> None:
    names, number = picked.get("id2label"), picked.get("num_labels")
    if type(number) is int and number < 1:
        raise FolderInvalid(
            f"config.json has num_labels: {number:,}, which must be at least 1; give the outputs of the head, or leave "
            "it out",
            file="config.json",
        )
    if names is not None and not (isinstance(names, dict) and all(map(_is_name, names.values()))):
        odd = next((each for each in names.values() if not _is_name(each)), "") if isinstance(names, dict) else names
        raise FolderInvalid(
            f"config.json has an id2label that is not an object of names, but has {shorten(str(odd))}; write it as "
            '{"0": "first", "1": "second"}',
            file="config.json",
        )
    if names is not None and len(names) > MOST_LABELS:
        raise FolderInvalid(
            f"config.json has {len(names):,} labels; at most {MOST_LABELS:,} are possible", file="config.json"
        )


def _is_name(value: Any) -> bool:
    """Whether it names a label: a text, or a whole number, as scripts write that had no names."""
    return isinstance(value, str) or type(value) is int


def is_of(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a value is of one of the types; true and false are not numbers."""
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def wrong_type(file: str, name: str, value: Any, types: tuple[type, ...]) -> FolderInvalid:
    """The error of a setting that is of none of the types."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
    wanted = words.get(types[-1], "a list")
    return FolderInvalid(
        f"{file} has {name}: {shorten(str(value))!r}, which is not {wanted}; correct it, or leave it out", file=file
    )
