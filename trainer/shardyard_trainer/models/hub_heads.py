"""The layer that gives a module's logits: found under all its names, replaced, and held by another module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

HEADS = (nn.Linear, nn.Conv2d)
"""Layers that can give a module's logits: a convolution of one place (1 × 1) is a linear layer for each place."""

_OF_LAYERS = frozenset({"weight", "bias", *nn.Linear.__constants__, *nn.Conv2d.__constants__})


class HeldElsewhere(nn.Module):
    """Calls a layer that another module holds: its parameters are registered there alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """What the layer gives."""
        found: torch.Tensor = self._layer[0](features)
        return found

    def __getattr__(self, name: str) -> Any:
        """What code around a layer reads of it, such as the dtype of its weight; nothing else, so that what libraries
        note at the layer is not taken for this module's.
        """
        if name in _OF_LAYERS:
            return getattr(self._layer[0], name)
        return super().__getattr__(name)


def names_of(network: nn.Module, layer: nn.Module) -> list[str]:
    """All names of a layer in a module that may hold it in several places."""
    return [name for name, part in network.named_modules(remove_duplicate=False) if part is layer]


def put(network: nn.Module, names: Iterable[str], layer: nn.Module) -> None:
    """Puts a layer into a module under each name."""
    for name in names:
        network.set_submodule(name, layer)


def num_outputs(layer: nn.Module) -> int:
    """How many outputs a layer of `HEADS` has."""
    return int(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features)  # type: ignore[arg-type]


def with_outputs(layer: nn.Module, number: int, *, bias: bool | None = None) -> nn.Module:
    """A new layer in place of one of `HEADS`, with another number of outputs."""
    has_bias = layer.bias is not None if bias is None else bias
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, number, 1, layer.stride, layer.padding, bias=has_bias)  # type: ignore[arg-type]
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, number, bias=has_bias)
