"""Models with an adapter of peft: its changes added once to the weights of its model, as a folder in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.models.adapter_file import MERGE, WEIGHTS, Adapter, Change, check_adapter, read_adapter
from shardyard_trainer.models.conversion import check_room, converted_folder, write_note
from shardyard_trainer.models.door import CODE, MAX_VOCABULARY_BYTES, Folder, FolderInvalid
from shardyard_trainer.models.folder import OWN_TYPES, TORCH_HUB_TYPES, read_folder
from shardyard_trainer.models.known_files import digest, file_names
from shardyard_trainer.models.loading import LOADING_ERRORS, prepare_config, quiet
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.models.weight_heads import auto_class, refuse_deep
from shardyard_trainer.models.weight_report import judge
from shardyard_trainer.models.weights import (
    INDEX,
    WeightsInvalid,
    load_pretrained,
    no_weights,
    read_header,
    read_tensors,
    weight_names,
)
from shardyard_trainer.plain_words import in_plain_words

_VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("sentencepiece.model", "spm.model"),
)
_TEMPLATE = "chat_template.jinja"
_OF_TOKENIZERS = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", _TEMPLATE),
)
_MODULES = "modules.json"
_CLASSES = tuple(
    f"AutoModelFor{name}"
    for name in (
        *("ImageClassification", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
        *("CausalLM", "Seq2SeqLM", "MaskedLM"),
    )
)
_NOT_COPIED = ("config.json", "shardyard.json", INDEX)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def with_adapter(adapter: Folder, base: Folder, cache_dir: Path) -> Folder:
    """The model of `base` with the adapter of another folder, as a Hugging Face folder in the cache.

    Raises FolderInvalid, and WeightsInvalid for files of weights.
    """
    check_adapter(adapter)
    if not weight_names(base):
        raise no_weights(base)
    parts = {"adapter": adapter, "base": base}
    key = {part: {name: digest(folder, name) for name in file_names(folder)} for part, folder in parts.items()}
    return converted_folder(cache_dir, key, lambda target: _build(adapter, base, target))


def _build(folder: Folder, base: Folder, target: Path) -> None:
    adapter = read_adapter(folder)
    described = read_folder(base)
    if described.model_type in (*OWN_TYPES, *TORCH_HUB_TYPES) or base.has("head.safetensors"):
        text = f"the model that the adapter is to change is a {described.model_type} that transformers does not have"
        raise FolderInvalid(f"{text}; give the one that the adapter was trained beside", file="config.json")
    tensors = [each for name in weight_names(base) for each in read_header(base, name)]
    check_room("the model with its adapter", sum(math.prod(each.shape) for each in tensors), target)
    # The class that the adapter names, else its model's own, else one that has all that it changes.
    classes = dict.fromkeys([*filter(None, (adapter.auto, described.auto)), *(() if adapter.auto else _CLASSES), ""])
    try:
        with quiet():
            refuse_deep(model_config(base), len(tensors))
            _changed(adapter, base, classes).save_pretrained(target)
    except (FolderInvalid, WeightsInvalid):
        raise
    except LOADING_ERRORS as error:
        raise FolderInvalid(f"the adapter cannot be merged: {in_plain_words(error)}; {MERGE}", file=WEIGHTS) from None
    _copy_rest(folder, base, target)
    named = f", trained beside {shorten(adapter.base)}" * bool(adapter.base)
    what = f"{len(adapter.changes):,} layers changed, {len(adapter.whole):,} tensors replaced"
    write_note(target, f"merged from a LoRA adapter{named}: {what}")


def _copy_rest(adapter: Folder, base: Folder, target: Path) -> None:
    """Copies what is beside the weights: from the model, but from the adapter what that has of its own.

    That may be a tokenizer, a chat template, and what sentence-transformers does with the vectors.
    """
    has_tokenizer, has_parts = any(adapter.has(name) for name in _VOCABULARIES), adapter.has(_MODULES)
    weights = set(base.weight_names())
    for folder in (base, adapter):
        for name in file_names(folder):
            is_own = (has_tokenizer and name in _OF_TOKENIZERS) or (has_parts and _is_of_sentences(name))
            is_own |= name == _TEMPLATE and adapter.has(name)
            is_wanted = is_own == (folder is adapter)
            if not is_wanted or name in _NOT_COPIED or name in weights or name.startswith(f"{CODE}/"):
                continue
            place = target / name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(folder.read(name, most_bytes=MAX_VOCABULARY_BYTES))


def _is_of_sentences(name: str) -> bool:
    """Whether a file is one that makes a folder one of sentence-transformers."""
    is_part = "/" in name and not name.startswith(f"{CODE}/")
    return is_part or name in {_MODULES, "config_sentence_transformers.json"} or name.startswith("sentence_")


@dataclass(frozen=True)
class _Fit:
    """The class and configuration of the model that an adapter fits, and its parameters by the adapter's names."""

    auto: str
    config: Any
    names: Mapping[str, str]


def _changed(adapter: Adapter, base: Folder, classes: Iterable[str]) -> Any:
    """The model with the adapter's changes."""
    fit = _fitting(adapter, base, classes)
    model, info = load_pretrained(auto_class(fit.auto), base, fit.config, ignore_mismatched_sizes=True)
    if any("pooler" in name for name in info["missing_keys"]):
        model.pooler = None  # Of a backbone alone; a head that reads one was refused.
    tensors = read_tensors(adapter.folder, WEIGHTS)
    whole = {fit.names[name]: tensors[stored].float() for name, stored in adapter.whole.items()}
    with torch.no_grad():
        for name, values in whole.items():
            _own(model, name, whole).copy_(values)
        for layer, change in adapter.changes.items():
            _apply(model, fit.names[_weight(layer)], change, tensors)
    return model


def _weight(layer: str) -> str:
    return f"{layer}.weight"


def _fitting(adapter: Adapter, base: Folder, classes: Iterable[str]) -> _Fit:
    """The first class that has everything that the adapter changes, and nothing that only chance would fill.

    Raises FolderInvalid.
    """
    wanted = [*adapter.whole, *map(_weight, adapter.changes)]
    lacking, failed = wanted, None
    for auto in classes:
        config = prepare_config(model_config(base))
        kind = auto_class(auto)
        if type(config) not in kind._model_mapping:
            continue
        model, info = load_pretrained(kind, base, config, device_map="meta", ignore_mismatched_sizes=True)
        names = _places(model, wanted)
        lacking = min(lacking, [name for name in wanted if name not in names], key=len)
        if names.keys() < set(wanted):
            continue
        try:
            _fit_sizes(config, model, adapter, names)
            _check_complete(model, info, adapter, names)
        except FolderInvalid as error:
            failed = failed or error
        else:
            return _Fit(auto, config, names)
    if failed is not None:
        raise failed
    trained = f"; it was trained beside {shorten(adapter.base)!r}" * bool(adapter.base)
    raise FolderInvalid(
        f"the adapter changes {len(lacking):,} of {len(wanted):,} tensors that this model does not have, "
        f"{listed(lacking, most=2)} among them{trained}: give that model as its base",
        file=WEIGHTS,
        tensor=lacking[0],
    )


def _places(model: Any, wanted: Iterable[str]) -> dict[str, str]:
    """The names of the model's parameters that an adapter means, which may have the names of earlier versions."""
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {name: name for name in wanted if name in there}
    # Only changes of names: what joins or splits tensors would have to do so with those of the adapter, too.
    renamings = [each for each in get_model_conversion_mapping(model) if not hasattr(each, "operations")]
    for name in wanted:
        now = name
        for renaming in renamings:
            now = renaming.rename_source_key(now)[0]
        if name not in found and now in there:
            found[name] = now
    return found


def _fit_sizes(config: Any, model: Any, adapter: Adapter, names: Mapping[str, str]) -> None:
    """Gives the configuration the number of tokens and labels that the adapter has whole tensors for."""
    tables, num_labels = _tables(model), config.num_labels
    for name, stored in adapter.whole.items():
        shape, wanted = adapter.shapes[stored], tuple(model.get_parameter(names[name]).shape)
        part = model.get_submodule(names[name].rpartition(".")[0])
        if shape == wanted:
            continue
        if not shape or shape[1:] != wanted[1:]:
            _refuse_shape(stored, shape, wanted)
        if any(part is each for each in tables):
            config.get_text_config().vocab_size = shape[0]
        elif wanted[0] == num_labels:
            config.num_labels = shape[0]
        else:
            _refuse_shape(stored, shape, wanted)


def _check_complete(model: Any, info: Mapping[str, Any], adapter: Adapter, names: Mapping[str, str]) -> None:
    """Raises FolderInvalid for parts of the model that neither its own weights have nor the adapter."""
    replaced = {names[name] for name in adapter.whole}
    changed = {names[_weight(layer)] for layer in adapter.changes}
    left = {
        **info,
        "missing_keys": [name for name in info["missing_keys"] if name not in replaced],
        "mismatched_keys": [each for each in info["mismatched_keys"] if each[0] not in replaced],
    }
    # A backbone alone does without its pooler; a head that has one reads it.
    has_head = model.base_model is not model
    poolers = [name for name in left["missing_keys"] if "pooler" in name and (has_head or name in changed)]
    if lacking := [*judge(model, left).lacking, *poolers]:
        raise FolderInvalid(
            f"neither the adapter nor its model has {listed(lacking, most=3)} of a {type(model).__name__}; train the "
            "adapter with `modules_to_save`, or give the model with the head that it was trained beside",
            file=WEIGHTS,
            tensor=lacking[0],
        )


def _tables(model: Any) -> list[nn.Module]:
    """The layers with a row for each token."""
    found: list[nn.Module] = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(RuntimeError):  # That of models of pictures, which say that they have none.
            found += [each for each in [get()] if each is not None]
    return found


def _apply(model: Any, name: str, change: Change, tensors: Mapping[str, torch.Tensor]) -> None:
    """Adds a layer's change: W + scale · B A, in 32 bits."""
    layer = model.get_submodule(name.rpartition(".")[0])
    kind = type(layer)
    is_convolution = kind in _CONVOLUTIONS and layer.groups == 1
    if kind not in (nn.Linear, nn.Embedding, Conv1D) and not is_convolution:
        text = f"the layer {shorten(name)!r} is a {kind.__name__}, whose adapters are not merged; {MERGE}"
        raise FolderInvalid(text, file=WEIGHTS, tensor=name)
    a, b = (tensors[each].float().flatten(1) for each in (change.a, change.b))
    is_turned = kind in (nn.Embedding, Conv1D)
    weight = _own(model, name)
    delta = (b @ a) * change.scale
    delta = delta.T if is_turned else delta
    if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
        _refuse_shape(change.a, tuple(delta.shape), tuple(weight.shape))
    weight += delta.reshape(weight.shape)
    if change.magnitude:
        _rescale(weight, tensors[change.magnitude].float(), name, kind)
    if change.bias:
        if layer.bias is None:
            _refuse_shape(change.bias, tuple(tensors[change.bias].shape), ())
        layer.bias += tensors[change.bias].float() * change.scale


def _rescale(weight: torch.Tensor, magnitude: torch.Tensor, name: str, kind: type[nn.Module]) -> None:
    """Gives the weights of each output the length of the adapter (DoRA)."""
    if kind not in (nn.Linear, Conv1D):
        text = f"the layer {shorten(name)!r} is a {kind.__name__}, whose DoRA adapters are not merged; {MERGE}"
        raise FolderInvalid(text, file=WEIGHTS, tensor=name)
    rows = weight.T if kind is Conv1D else weight
    if magnitude.shape != rows.shape[:1]:
        _refuse_shape(name, tuple(magnitude.shape), tuple(rows.shape[:1]))
    rows *= (magnitude / rows.norm(dim=1)).unsqueeze(1)


def _own(model: Any, name: str, new: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A parameter to be changed. One that other layers share becomes a copy, as peft changes one layer alone, unless
    all of them get the same `new` values.
    """
    parameter: nn.Parameter = model.get_parameter(name)
    others = [each for each, its in model.named_parameters(remove_duplicate=False) if its is parameter and each != name]
    place, _, last = name.rpartition(".")
    if last != "weight" or all(new and each in new and torch.equal(new[each], new[name]) for each in others):
        return parameter
    layer = model.get_submodule(place)
    if len(others) > 1 or not any(layer is each for each in _tables(model)):
        text = f"the adapter changes {shorten(name)!r}, which is also {listed(others, most=2)}"
        raise FolderInvalid(f"{text}; {MERGE}", file=WEIGHTS, tensor=name)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    setattr(layer, last, own)
    return own


def _refuse_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> NoReturn:
    raise FolderInvalid(
        f"the tensor {shorten(name)!r} of {WEIGHTS} makes the shape {list(found)}, but the model has {list(wanted)} "
        "there; give the model that the adapter was trained beside",
        file=WEIGHTS,
        tensor=name,
    )
