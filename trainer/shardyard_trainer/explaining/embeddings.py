"""Tokens as points that gradients reach: the embeddings of a model, exchanged in its forward pass.

The model still reads the true token ids, so that everything else it takes from them (positions, which place is the
last) stays as it is; only the vectors that its embedding layer gives for them are others.
Shape suffixes: N rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from shardyard_trainer.explaining.integral import Line, Unexplainable
from shardyard_trainer.models import architectures

_WHY = "so the shares of its tokens cannot be computed"


class _Reading(NamedTuple):
    """The layer that gives the vectors of the tokens, and what it reads; `is_turned`: as [T, N] instead of [N, T]."""

    layer: nn.Module
    ids_1T: torch.Tensor
    is_turned: bool


def line_of_tokens(model: Any, ids: Sequence[int], blank: Sequence[int], output: Callable[[int], torch.Tensor]) -> Line:
    """The line from the embeddings of `blank` to those of `ids`, as many tokens; `output` computes N rows of `ids`.

    Tokens that the model reads after these (a mask) are the same at both ends. Raises Unexplainable.
    """
    if architectures.is_seq2seq(model.config):
        raise Unexplainable(f"an encoder-decoder reads its text twice, {_WHY}")
    reading = _reading_of(model, ids, output)
    blank_1T = reading.ids_1T.clone()
    blank_1T[0, : len(blank)] = torch.tensor(blank)
    with torch.no_grad():
        start, end = reading.layer(blank_1T), reading.layer(reading.ids_1T)

    def outputs_of(rows_NTD: torch.Tensor) -> torch.Tensor:
        with _Exchange(reading, rows_NTD):
            return output(len(rows_NTD))

    return Line(start, end, outputs_of, reading.ids_1T.shape[1], vector_dim=2)


def _reading_of(model: Any, ids: Sequence[int], output: Callable[[int], torch.Tensor]) -> _Reading:
    """Finds the layer that reads the tokens by what layers are called with."""
    own = _own_layer(model)
    layers = {module for module in model.modules() if isinstance(module, nn.Embedding)} | ({own} if own else set())
    calls: list[_Reading] = []
    wanted = torch.tensor([ids])

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], found: Any) -> None:
        read = (*given, *named.values())[0]
        if not isinstance(read, torch.Tensor):  # Positions may be given as a size.
            return
        for is_turned, read_1T in ((False, read), (True, read.mT if read.dim() == 2 else read)):
            is_like = read_1T.dim() == 2 and torch.equal(read_1T[:, : len(ids)], wanted)
            if is_like and isinstance(found, torch.Tensor):
                calls.append(_Reading(layer, read_1T, is_turned))
                return

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        output(1)
    # The positions of a text may be the same numbers as its tokens, so the model's own word comes first.
    readings = [call for call in calls if call.layer is own] or calls
    if len(readings) != 1:
        how = f"{len(readings)} layers, or one several times," if readings else "no layer"
        raise Unexplainable(f"{how} of this model turns a text's tokens into vectors, {_WHY}")
    return readings[0]


def _own_layer(model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = model.get_input_embeddings()
    except (RuntimeError, AttributeError):  # A class of transformers, or a module of PyTorch Hub, that does not say.
        return None
    return layer


class _Exchange:
    """While it is entered, the embedding layer gives `rows` [N, T, D], in their order, however many a call asks for."""

    def __init__(self, reading: _Reading, rows_NTD: torch.Tensor) -> None:
        self._reading = reading
        self._rows_NTD = rows_NTD
        self._taken = 0

    def __enter__(self) -> None:
        self._hook = self._reading.layer.register_forward_hook(self._give)

    def __exit__(self, *_error: object) -> None:
        self._hook.remove()

    def _give(self, _layer: nn.Module, _given: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
        count = found.shape[1 if self._reading.is_turned else 0]
        rows = self._rows_NTD[self._taken : self._taken + count]
        self._taken += count
        rows = rows.transpose(0, 1) if self._reading.is_turned else rows
        if rows.shape != found.shape:
            raise Unexplainable(f"this model reads its tokens several times, {_WHY}")
        return rows.clone()  # A model may change it in place, which the rows of a line do not allow.
