"""Adapters as peft saves them (adapter_config.json, adapter_model.safetensors), read as changes of a model's layers.

Of the settings those are read that decide what an adapter computes; any other that is not empty and not known to be
without effect is refused by name. Which layers are changed is taken from the tensors' names, so no pattern of the file
is ever run. The format: github.com/huggingface/peft, `LoraConfig` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.settings import is_of, wrong_type
from shardyard_trainer.models.weights import Tensor, check_finite, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it into its model (`merge_and_unload` of peft), save that, and give its folder"

_PROMPTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"}
)
"""Methods that train what a model reads besides its texts, which no weights of the model can have."""

_PREFIX = "base_model.model."
_MOST_FOLDERS = 100
_CLASSES: Mapping[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "",
}
"""Transformers' classes by peft's types of task."""

_READ = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
        *("use_rslora", "use_dora", "init_lora_weights"),
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        # What was trained, and how; the tensors say what came of it.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
        *("lora_bias", "lora_dropout", "fan_in_fan_out", "ensure_weight_tying"),
        # How adapters are begun, saved and run.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
        *("auto_mapping", "inference_mode", "peft_version", "revision", "megatron_config", "megatron_core"),
    }
)
_INITS_BESIDE = ("true", "false", "gaussian", "orthogonal", "eva")
"""Ways to begin an adapter that leave the model's own weights as they are; others change these too."""

_PART = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<part>[AB])(?:\.default)?\.(?P<kind>weight|bias)|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_PATTERN = re.compile(r"\^?[A-Za-z0-9_]+(\\?\.[A-Za-z0-9_]+)*\$?")


@dataclass(frozen=True)
class Change:
    """What an adapter adds to a layer: `scale` · B A, and `scale` · `bias` to its bias; the names of tensors.

    `magnitude` has the lengths that the rows of the changed weight get (DoRA, Liu et al., 2024); empty: as they are.
    """

    a: str
    b: str
    scale: float
    bias: str = ""
    magnitude: str = ""


@dataclass(frozen=True)
class Adapter:
    """What a folder's adapter does to its model.

    `changes` are by the names of layers, `whole` are tensors that take the place of the model's, by its names, each
    with its name in the file; `shapes` are those of the file's tensors. `auto` is transformers' class of the model that
    it was trained beside, None if it does not say, and `base` how its author called that model.
    """

    folder: Folder
    auto: str | None
    base: str
    changes: Mapping[str, Change]
    whole: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def check_adapter(folder: Folder) -> None:
    """Raises FolderInvalid for a folder without an adapter, or with a pickle of one alone."""
    if not folder.has(CONFIG):
        inner = _folder_with_adapter(folder)
        step = f"its folder {shorten(inner)!r} has one: give that" if inner else "give the folder as peft saves it"
        raise FolderInvalid(f"the folder has no {CONFIG}; {step}", file=CONFIG)
    if not folder.has(WEIGHTS):
        if "adapter_model.bin" in folder.names():
            raise FolderInvalid(
                f"adapter_model.bin is a pickle, which can run code when it is loaded, and is never opened; save the "
                f"adapter as {WEIGHTS} (`save_pretrained` of peft does)",
                reason="MODEL_UNSAFE",
                file="adapter_model.bin",
            )
        raise FolderInvalid(f"the folder has no {WEIGHTS}; copy the whole folder of the adapter", file=WEIGHTS)


def _folder_with_adapter(folder: Folder) -> str:
    """The name of a folder in it with an adapter, as peft saves one that has a name of its own; empty: none."""
    inner = (path for path in islice(folder.path.iterdir(), _MOST_FOLDERS) if path.is_dir() and not path.is_symlink())
    return next((path.name for path in sorted(inner) if (path / CONFIG).is_file()), "")


def read_adapter(folder: Folder) -> Adapter:
    """Reads a folder that `check_adapter` has nothing against. Raises FolderInvalid and `weights.WeightsInvalid`."""
    values = folder.read_object(CONFIG)
    _check_settings(values)
    header = read_header(folder, WEIGHTS)
    check_finite(folder, WEIGHTS, header)
    parts, whole = _sorted_out(header)
    shapes = {tensor.name: tensor.shape for tensor in header}
    if not parts and not whole:
        raise FolderInvalid(f"{WEIGHTS} has no tensors; save the adapter again", file=WEIGHTS)
    kind, base = values.get("task_type"), values.get("base_model_name_or_path")
    return Adapter(
        folder,
        _CLASSES.get(str(kind)) if kind else None,
        base if isinstance(base, str) else "",
        {layer: _change(layer, found, values, shapes) for layer, found in parts.items()},
        whole,
        shapes,
    )


def _check_settings(values: Mapping[str, Any]) -> None:
    if (kind := str(values.get("peft_type"))) in _PROMPTS:
        raise FolderInvalid(
            f"the adapter is of the type {kind!r}, which is read beside the texts and cannot become part of a model's "
            "weights; train a LoRA adapter instead, or fine-tune the model itself",
            file=CONFIG,
        )
    if kind != "LORA":
        raise FolderInvalid(f"the adapter is of the type {shorten(kind)!r}, only LORA is read; {MERGE}", file=CONFIG)
    begun = str(values.get("init_lora_weights", True)).lower()
    if begun not in _INITS_BESIDE:
        raise FolderInvalid(
            f"init_lora_weights is {shorten(begun)!r}, which changes the weights of the model itself too; save the "
            f"adapter with `path_initial_model_for_weight_conversion` of peft, or {MERGE}",
            file=CONFIG,
        )
    unknown = [key for key, value in values.items() if key not in _READ | _WITHOUT_EFFECT and value]
    if unknown:
        raise FolderInvalid(
            f"{CONFIG} has settings that are not read, and without them it would be another adapter: "
            f"{listed(sorted(unknown), most=5)}; {MERGE}",
            file=CONFIG,
        )


def _sorted_out(header: list[Tensor]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The tensors of each layer's change by their part, and those that take the place of the model's."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for tensor in header:
        name = tensor.name.removeprefix(_PREFIX)
        if name == tensor.name:
            raise FolderInvalid(
                f"the tensor {shorten(tensor.name)!r} of {WEIGHTS} does not begin with {_PREFIX!r}, as peft names "
                "them; save the adapter with `save_pretrained` of peft",
                file=WEIGHTS,
                tensor=tensor.name,
            )
        if 0 in tensor.shape:
            raise FolderInvalid(
                f"the tensor {shorten(tensor.name)!r} of {WEIGHTS} has no values, as ZeRO stage 3 leaves weights "
                "that it has not gathered; save the adapter again (stage3_gather_16bit_weights_on_model_save)",
                file=WEIGHTS,
                tensor=tensor.name,
            )
        if ".original_module." in name:
            continue  # What a part was before it was trained as a whole, as `bias: all` saves it too.
        if found := _PART.fullmatch(name):
            bias = "_bias" if found["kind"] == "bias" else ""
            part = "magnitude" if found["magnitude"] else (found["part"] or found["embedding"]) + bias
            parts.setdefault(found["layer"].replace(".base_layer", ""), {})[part] = tensor.name
        elif "lora_" in name or "trainable_tokens" in name:
            raise FolderInvalid(
                f"the tensor {shorten(tensor.name)!r} of {WEIGHTS} is of a kind that is not read; {MERGE}",
                file=WEIGHTS,
                tensor=tensor.name,
            )
        else:
            whole[re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", name)] = tensor.name
    return parts, whole


def _change(
    layer: str, parts: Mapping[str, str], values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Change:
    if not {"A", "B"} <= parts.keys() or "A_bias" in parts:
        there = listed(sorted(parts.values()), most=2)
        _refuse(layer, f"needs a pair of matrices, lora_A and lora_B, but has {there}")
    rank = shapes[parts["A"]][0] if shapes[parts["A"]] else 0
    inner = shapes[parts["B"]][1] if len(shapes[parts["B"]]) > 1 else 0
    named = _number(values, "rank_pattern", layer, "r", 8)
    if not rank or rank != inner or named not in {None, rank}:
        said = "" if named is None else f", but {CONFIG} says {named:g}"
        _refuse(layer, f"has matrices of the ranks {rank} and {inner}{said}")
    if (alpha := _number(values, "alpha_pattern", layer, "lora_alpha", 8)) is None:
        raise FolderInvalid(
            f"alpha_pattern of {CONFIG} has patterns other than names, which are not run; {MERGE}", file=CONFIG
        )
    scale = alpha / (rank**0.5 if values.get("use_rslora") is True else rank)
    if bool(values.get("use_dora")) != ("magnitude" in parts):
        _refuse(layer, "has lora_magnitude_vector or lacks it, against use_dora")
    return Change(parts["A"], parts["B"], scale, parts.get("B_bias", ""), parts.get("magnitude", ""))


def _number(values: Mapping[str, Any], patterns: str, layer: str, setting: str, default: float) -> float | None:
    """A layer's rank or alpha: that of the first pattern that fits its name, as in peft, else the one for all.

    None: a pattern that is more than a name, and is never run, may fit.
    """
    found = values.get(patterns) or {}
    if not isinstance(found, dict):
        raise wrong_type(CONFIG, patterns, found, (dict,))
    name, value = setting, values.get(setting, default)
    for pattern, own in found.items():
        if not _PATTERN.fullmatch(pattern):
            return None
        plain = pattern.removesuffix("$").replace("\\.", ".")
        is_whole = plain.startswith("^")
        plain = plain.removeprefix("^")
        if layer == plain or (not is_whole and layer.endswith(f".{plain}")):
            name, value = f"{patterns}.{pattern}", own
            break
    if not is_of(value, (int, float)) or not 0 < value < 2**31:
        raise wrong_type(CONFIG, name, value, (int, float))
    return float(value)


def _refuse(layer: str, what: str) -> NoReturn:
    text = f"the layer {shorten(layer)!r} of {WEIGHTS} {what}; save the adapter again"
    raise FolderInvalid(text, file=WEIGHTS, tensor=layer)
