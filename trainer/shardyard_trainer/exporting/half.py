"""A model in bfloat16: safetensors of half the size, written and read by transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from shardyard_trainer.exporting.network import Tensors
from shardyard_trainer.models.loading import prepare_config, quiet
from shardyard_trainer.tasks.module import HuggingFaceModule

HEAD = "head.safetensors"


def write_half(folder: Path, module: HuggingFaceModule) -> None:
    """Writes config.json, the weights, and a head of our own in a file beside them."""
    # A copy in memory: the module itself stays in fp32.
    model = copy.deepcopy(module.model).to(torch.bfloat16)
    if model.can_generate():
        model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder)
    # The model's own is copied: transformers refuses to save some that it reads.
    (folder / "generation_config.json").unlink(missing_ok=True)
    if module.own_head is not None:
        head = {name: tensor.bfloat16().contiguous() for name, tensor in module.own_head.state_dict().items()}
        save_file(head, folder / HEAD)


class HalfNetwork:
    """The folder loaded afresh, computing in bfloat16, as a `Compute`."""

    def __init__(self, folder: Path, module: HuggingFaceModule) -> None:
        config = prepare_config(copy.deepcopy(module.model.config))
        with quiet():
            model = type(module.model).from_pretrained(
                folder, config=config, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
            )
        if getattr(module.model.base_model, "pooler", model) is None:
            model.base_model.pooler = None
        self._module = copy.copy(module)
        self._module.__dict__["_modules"] = dict(module._modules)
        self._module.model = model.eval()
        if module.own_head is not None:
            self._module.own_head = _head(folder, module.own_head)
        self._module.eval()

    def __call__(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """The outputs by their names, fp32."""
        given = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        return {name: values.float() for name, values in self._module.network(given).items()}


def _head(folder: Path, like: nn.Linear) -> nn.Linear:
    head = nn.Linear(like.in_features, like.out_features, bias=like.bias is not None, dtype=torch.bfloat16)
    head.load_state_dict(load_file(folder / HEAD))
    return head.requires_grad_(False)
