"""Adapters as people bring them: made and saved by peft, with weights that change what the model says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapt(folder: Path, base: Path, kind: str, *, num_tokens: int = 0, num_labels: int = 0, **lora: Any) -> Any:
    """Saves an adapter for transformers' class `kind` of the model in `base`; returns peft's model, unmerged.

    `num_tokens`, `num_labels`: the model is given so many before.
    """
    from peft import LoraConfig, get_peft_model

    given = {"num_labels": num_labels} if num_labels else {}
    model = getattr(transformers, kind).from_pretrained(base, **given)
    if num_tokens:
        model.resize_token_embeddings(num_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **lora})).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        adapted.save_pretrained(folder)
    return adapted


def change_settings(folder: Path, **changes: Any) -> None:
    """Changes values of adapter_config.json."""
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | str | None) -> None:
    """Changes tensors by the ends of their names: another value, another name, or None to leave one out."""
    tensors = load_file(folder / WEIGHTS)
    for end, change in changes.items():
        (name,) = [each for each in tensors if each.endswith(end)]
        value = tensors.pop(name)
        if isinstance(change, str):
            tensors[name.removesuffix(end) + change] = value
        elif change is not None:
            tensors[name] = change
    save_file(tensors, folder / WEIGHTS)
