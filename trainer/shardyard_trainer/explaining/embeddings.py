"""Tokens as points that gradients reach: the embeddings of a model, exchanged in its forward pass.

The model still reads the true token ids, so that everything else it takes from them (positions, which place is the
last) stays as it is; only the vectors that its embedding layer gives for them are others.
Shape suffixes: N rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from shardyard_trainer.explaining.integral import Line, Unexplainable
from shardyard_trainer.models import architectures

_WHY = "so the shares of its tokens cannot be computed"


def line_of_tokens(model: Any, ids: Sequence[int], blank: Sequence[int], output: Callable[[int], torch.Tensor]) -> Line:
    """The line from the embeddings of `blank` to those of `ids`, as many tokens; `output` computes N rows of `ids`.

    Tokens that the model reads after these (a mask) are the same at both ends. Raises Unexplainable.
    """
    if architectures.is_seq2seq(model.config):
        raise Unexplainable(f"an encoder-decoder reads its text twice, {_WHY}")
    layer, read_1T = _embedding_layer(model, ids, output)
    blank_1T = read_1T.clone()
    blank_1T[0, : len(blank)] = torch.tensor(blank)
    with torch.no_grad():
        start, end = layer(blank_1T), layer(read_1T)

    def outputs_of(rows_NTD: torch.Tensor) -> torch.Tensor:
        with _Exchange(layer, rows_NTD):
            return output(len(rows_NTD))

    return Line(start, end, outputs_of, read_1T.shape[1])


def _embedding_layer(
    model: Any, ids: Sequence[int], output: Callable[[int], torch.Tensor]
) -> tuple[nn.Module, torch.Tensor]:
    """The layer that gives the vectors of the tokens, found by what it is called with, and what it reads [1, T]."""
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    wanted = torch.tensor([ids])

    def note(layer: nn.Module, given: tuple[Any, ...], _found: Any) -> None:
        read: torch.Tensor = given[0] if given else wanted[:, :0]
        if read.dim() == 2 and torch.equal(read[:, : len(ids)], wanted):
            calls.append((layer, read))

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                hooks.enter_context(module.register_forward_hook(note))
        output(1)
    own = _own_layer(model)
    # The positions of a text may be the same numbers as its tokens, so the model's own word comes first.
    found = [call for call in calls if call[0] is own] or calls
    if len(found) != 1:
        how = f"{len(found)} layers, or one several times," if found else "no layer"
        raise Unexplainable(f"{how} of this model turns a text's tokens into vectors, {_WHY}")
    return found[0]


def _own_layer(model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return layer


class _Exchange:
    """While it is entered, the embedding layer gives `rows` [N, T, D], in their order, however many a call asks for."""

    def __init__(self, layer: nn.Module, rows_NTD: torch.Tensor) -> None:
        self._rows_NTD = rows_NTD
        self._taken = 0
        self._layer = layer

    def __enter__(self) -> None:
        self._hook = self._layer.register_forward_hook(self._give)

    def __exit__(self, *_error: object) -> None:
        self._hook.remove()

    def _give(self, _layer: nn.Module, _given: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
        rows = self._rows_NTD[self._taken : self._taken + len(found)]
        self._taken += len(found)
        if rows.shape != found.shape:
            raise Unexplainable(f"this model reads its tokens several times, {_WHY}")
        return rows.clone()  # A model may change it in place, which the rows of a line do not allow.
