"""Which parameters of a model are trained: all, all except frozen ones, or LoRA adapters beside frozen weights.

Used for every fine-tuning task alike, right after its module is made; the tasks know nothing of it. Heads are always
trained: everything outside of the backbone, and its pooler, but not the output layer of a language model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError, listed, nearest, shorten

if TYPE_CHECKING:
    from shardyard_trainer.tasks.module import HuggingFaceModule

DEFAULT_RANK = 8
DEFAULT_ALPHA = 16.0
ADAPTER = "default"
"""Peft's own name for the one adapter of a model; it is a part of the parameters' names."""

_FIELD = "spec.fine_tuning"
_LINEAR = (nn.Linear, Conv1D)
_AFTER_LAYERS = re.compile("norm|_out$")
"""Parts that some models (OPT) define before their layers, and use after them."""

_ADAPTABLE = (*_LINEAR, nn.Conv2d)


def adapt(module: HuggingFaceModule, wanted: spec_pb2.FineTuning) -> None:
    """Freezes what `wanted` says, and puts adapters beside the layers that it names.

    Their first weights are drawn with torch's current generator. Raises SpecError for layers that do not exist.
    """
    held = _parts_to_freeze(module.backbone, wanted.freeze) if wanted.HasField("freeze") else []
    for part in held:
        part.requires_grad_(False)
    if wanted.HasField("lora"):
        _inject(module, wanted.lora, held)
        held = [*held, *_norms(module.backbone)]
    module.hold(held)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        message = "nothing is left to train: the output layer shares the embeddings' weights; freeze some layers"
        raise SpecError(f"{_FIELD}.freeze", "SPEC_INVALID", message)


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a backbone from its input on, those of an encoder before those of its decoder."""
    layers: list[nn.Module] = []
    inside: set[int] = set()
    for part in backbone.modules():
        # Lists in a layer, such as the blocks of a stage, are parts of that layer.
        if isinstance(part, nn.ModuleList) and id(part) not in inside:
            layers += part
            inside.update(id(each) for each in part.modules())
    return layers


def has_layers_in_parts(backbone: nn.Module) -> bool:
    """Whether a layer is spread over lists of equal length, as XLM's attentions, norms and feed-forward parts are."""
    inside: set[int] = set()
    for part in backbone.modules():
        if id(part) in inside:
            continue
        lists = [each for each in part.children() if isinstance(each, nn.ModuleList)]
        if len(lists) > len({len(each) for each in lists}):
            return True
        for each in lists:
            inside.update(id(below) for below in each.modules())
    return False


def num_layers_frozen(module: HuggingFaceModule) -> int:
    """The number of layers below the first one with a trained parameter; all of them if the backbone has none."""
    is_in_parts = has_layers_in_parts(module.backbone)
    if is_in_parts or any(parameter.requires_grad for parameter in _before_layers(module.backbone)):
        return 0
    layers = layers_of(module.backbone)
    trained = (any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    return next((place for place, is_trained in enumerate(trained) if is_trained), len(layers))


def has_adapters(module: nn.Module) -> bool:
    """Whether the module has LoRA adapters."""
    return next(_adapted(module), None) is not None


def merged(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights W + alpha / rank · B A of the model without adapters, by its names.

    `model` has the adapters; `state_dict` has its weights, and is not changed.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    for name, layer in _adapted(model):
        a, b = (state_dict[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        weight = plain[f"{name}.weight"]
        # For a convolution, A has the kernel and B is one by one.
        change = b.flatten(1) @ a.flatten(1) * layer.scaling[ADAPTER]
        change = change.T if type(_base(layer)) is Conv1D else change
        plain[f"{name}.weight"] = (weight.float() + change.reshape(weight.shape)).to(weight.dtype)
    return plain


def save_adapter(
    folder: Path, module: HuggingFaceModule, state_dict: Mapping[str, torch.Tensor], wanted: spec_pb2.Lora
) -> None:
    """Writes the adapter alone, with the heads trained beside it, as `peft.PeftModel.from_pretrained` reads it.

    `state_dict` has the weights of `module`, by its names.
    """
    folder.mkdir()
    model = module.model
    config = _config(wanted, [name for name, _ in _adapted(model)], model)
    heads = _heads(module)
    trained = {id(parameter) for head in heads for parameter in head.parameters()}
    names = {id(part): name for name, part in model.named_modules()}
    config.modules_to_save = [name for head in heads if (name := names.get(id(head)))] or None
    config.save_pretrained(str(folder))
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or id(parameter) in trained:
            saved = name.replace(f".{ADAPTER}.", ".")
            tensors[f"base_model.model.{saved}"] = state_dict[f"model.{name}"].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _parts_to_freeze(backbone: nn.Module, wanted: spec_pb2.Freeze) -> list[nn.Module]:
    if wanted.backbone:
        return [backbone]
    layers = layers_of(backbone)
    if wanted.layers and has_layers_in_parts(backbone):
        message = f"a {type(backbone).__name__} has the parts of a layer in separate lists, so layers cannot be frozen"
        step = "freeze the backbone, train all of it, or use lora"
        raise SpecError(f"{_FIELD}.freeze.layers", "SPEC_INVALID", f"{message}; {step}")
    if wanted.layers > len(layers):
        message = f"{wanted.layers} layers are to be frozen, but the model has {len(layers)}; use at most {len(layers)}"
        raise SpecError(f"{_FIELD}.freeze.layers", "SPEC_INVALID", message, {"most": str(len(layers))})
    below = _before(backbone, layers) if wanted.embeddings or wanted.layers else []
    return [*below, *layers[: wanted.layers]]


def _before(backbone: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The embeddings: what is defined before the first layer, and every table of vectors outside of the layers."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    tops = {id(layer) for layer in layers}
    around = {""}
    for name, part in backbone.named_modules():
        if id(part) in tops:
            around.update(name[:end] for end, character in enumerate(name) if character == ".")
    found: list[nn.Module] = []
    is_before = bool(layers)
    for name, part in backbone.named_modules():
        is_before = is_before and id(part) not in inside
        is_input = is_before and not _AFTER_LAYERS.search(name.rpartition(".")[2])
        if id(part) not in inside and name not in around and (is_input or isinstance(part, nn.Embedding)):
            found.append(part)
    return found


def _before_layers(backbone: nn.Module) -> Iterator[nn.Parameter]:
    for part in _before(backbone, layers_of(backbone)):
        yield from part.parameters()


def _inject(module: HuggingFaceModule, wanted: spec_pb2.Lora, held: Sequence[nn.Module]) -> None:
    from peft import inject_adapter_in_model  # Seconds that only such a job pays for.

    model = module.model
    targets = _targets(module, wanted, held)
    heads = _heads(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(_config(wanted, targets, model), model, ADAPTER)
    for head in heads:
        head.requires_grad_(True)


def _config(wanted: spec_pb2.Lora, targets: Sequence[str], model: nn.Module) -> Any:
    from peft import LoraConfig

    parts = dict(model.named_modules())
    return LoraConfig(
        r=wanted.rank if wanted.HasField("rank") else DEFAULT_RANK,
        lora_alpha=wanted.alpha if wanted.HasField("alpha") else DEFAULT_ALPHA,
        lora_dropout=wanted.dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(type(_base(parts[name])) is Conv1D for name in targets),
        inference_mode=False,
    )


def _base(layer: nn.Module) -> nn.Module:
    """The layer that an adapter belongs to."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]


def _targets(module: HuggingFaceModule, wanted: spec_pb2.Lora, held: Sequence[nn.Module]) -> list[str]:
    """The names of the layers that get an adapter. Raises SpecError for a target that matches no layer."""
    output = module.model.get_output_embeddings()
    others = {id(part) for head in [*_heads(module), output] if head is not None for part in head.modules()}
    within = {id(part) for part in module.backbone.modules()} - others
    parts = {
        name: part
        for name, part in module.model.named_modules()
        # Subclasses may use their weights in another way than an adapter changes them.
        if id(part) in within and type(part) in _ADAPTABLE and getattr(part, "groups", 1) == 1
    }
    kinds = sorted({name.rpartition(".")[2] for name in parts})
    field = f"{_FIELD}.lora.targets"
    for index, wish in enumerate(wanted.targets):
        if not any(_fits(name, wish) for name in parts):
            message = (
                f"no layer of this {module.model.config.model_type} is called {shorten(wish)!r}"
                f"{nearest(wish, kinds)}; adapters go beside {listed(kinds)}"
            )
            raise SpecError(f"{field}[{index}]", "SPEC_INVALID", message, {"supported": ", ".join(kinds)[:400]})
    frozen = {id(part) for each in held for part in each.modules()}
    chosen = [
        name
        for name, part in parts.items()
        if id(part) not in frozen
        and (any(_fits(name, wish) for wish in wanted.targets) if wanted.targets else type(part) in _LINEAR)
    ]
    if not chosen:
        what = f"the backbone of this {module.model.config.model_type} has no linear layer to put adapters beside"
        advice = f"name some of {listed(kinds)} as targets" if kinds else "leave lora out"
        if held:
            what = "all layers that would get adapters are frozen"
            advice = "freeze fewer layers, or leave freeze or lora out"
        raise SpecError(field, "SPEC_INVALID", f"{what}; {advice}", {"supported": ", ".join(kinds)[:400]})
    return chosen


def _fits(name: str, wish: str) -> bool:
    return name == wish or name.endswith(f".{wish}")


def _heads(module: HuggingFaceModule) -> list[nn.Module]:
    """The parts that are trained in full: they are small, and may be new."""
    within = {id(parameter) for parameter in module.backbone.parameters()}
    output = module.model.get_output_embeddings()
    kept = within | ({id(parameter) for parameter in output.parameters()} if output is not None else set())
    heads: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        own = {id(parameter) for parameter in part.parameters()}
        if own and id(part) not in inside and not own & kept:
            heads.append(part)
            inside.update(id(each) for each in part.modules())
    pooler = getattr(module.backbone, "pooler", None)
    return [*heads, pooler] if isinstance(pooler, nn.Module) and list(pooler.parameters()) else heads


def _norms(backbone: nn.Module) -> list[nn.Module]:
    """Batch normalisation: its statistics belong to the frozen weights."""
    return [part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have an adapter."""
    for name, part in model.named_modules():
        if hasattr(part, "lora_A") and hasattr(part, "base_layer"):
            yield name, part
