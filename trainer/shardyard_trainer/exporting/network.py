"""A task's network apart from its module: what goes in, what comes out, and a module that asks another one.

The module of a task keeps its loss and metrics, whichever network computes (`HuggingFaceModule.answer_by`).
Shape suffixes: B samples, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from shardyard_trainer.inputs.base import POSITIONS_AT_ONCE
from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.base import Graph
from shardyard_trainer.tasks.module import HuggingFaceModule

Tensors = Mapping[str, torch.Tensor]
Compute = Callable[[Tensors], dict[str, torch.Tensor]]
"""A network: its inputs by name to the outputs of its `Graph`."""

PICTURES, IDS, MASK, TYPES = "pixel_values", "input_ids", "attention_mask", "token_type_ids"


def input_names(config: Any) -> tuple[str, ...]:
    """The inputs of a network of this configuration, in their order."""
    if architectures.is_of_pictures(config.model_type):
        return (PICTURES,)
    return (IDS, MASK, TYPES) if architectures.has_token_types(config) else (IDS, MASK)


def asking(module: HuggingFaceModule, graph: Graph, names: tuple[str, ...], compute: Compute) -> HuggingFaceModule:
    """The module with its loss and outputs, answered by another network; the given one stays as it is."""
    asked = copy.copy(module)
    # Shared with the copy otherwise, which then would change the original.
    asked.__dict__["_modules"] = dict(module._modules)
    asked.answer_by(Answering(graph, names, compute))
    return asked.eval()


class Answering(nn.Module):
    """Takes the calls that a task's module makes to its model, and answers by another network."""

    def __init__(self, graph: Graph, names: tuple[str, ...], compute: Compute) -> None:
        super().__init__()
        self._graph = graph
        self._names = names
        self._compute = compute
        # Modules look at it to see in which type their model computes.
        self.number = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """The outputs as attributes. Packed sequences are taken apart: each document is a text of its own."""
        if PICTURES in inputs:
            return SimpleNamespace(**self._compute({PICTURES: inputs[PICTURES]}))
        plain = {name: inputs[name] for name in self._names if inputs.get(name) is not None}
        starts_BT = _document_starts(inputs)
        if starts_BT is not None:
            return SimpleNamespace(**self._by_document(plain, starts_BT))
        return SimpleNamespace(**self._compute(completed(plain, self._names)))

    def _by_document(self, inputs: Tensors, starts_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for documents in _groups(starts_BT):
            outputs = self._compute(_cut_out(inputs, documents, self._names))
            for name, values in outputs.items():
                if name not in found:
                    found[name] = values.new_zeros(*starts_BT.shape, *values.shape[2:])
                for at, (row, first, last) in enumerate(documents):
                    found[name][row, first:last] = values[at, : last - first]
        return found


class Document(NamedTuple):
    """A document in a packed sequence: its row, its first position, and the one after its last."""

    row: int
    first: int
    last: int


def one_by_one(compute: Compute, graph: Graph) -> Compute:
    """The network asked for each sample alone, without padding, and its outputs put together again."""

    def ask(inputs: Tensors) -> dict[str, torch.Tensor]:
        shape = next(iter(inputs.values())).shape
        rows = [compute(_row(inputs, at)) for at in range(shape[0])]
        return {
            name: torch.stack([_padded(row[name][0], shape[1]) if "length" in axes else row[name][0] for row in rows])
            for name, axes in graph.outputs.items()
        }

    return ask


def _row(inputs: Tensors, at: int) -> dict[str, torch.Tensor]:
    """One sample, cut to its real length; samples are padded on the right."""
    if MASK not in inputs:
        return {name: tensor[at : at + 1] for name, tensor in inputs.items()}
    length = max(1, int(inputs[MASK][at].sum()))
    return {name: tensor[at : at + 1, :length] for name, tensor in inputs.items()}


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Values by position, with zeros behind them up to a length."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def completed(inputs: Tensors, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The inputs of a network, with those that a task leaves out: all positions are read, and of the first text."""
    ids_BT = inputs[IDS]
    defaults = {MASK: torch.ones_like(ids_BT), TYPES: torch.zeros_like(ids_BT)}
    return {name: inputs.get(name, defaults.get(name, ids_BT)).long() for name in names}


def _document_starts(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Where documents begin in packed sequences, bool [B, T]; None: the rows are texts.

    A mask of four axes says which positions see one another, else positions that restart say it.
    """
    mask, positions = inputs.get(MASK), inputs.get("position_ids")
    if mask is not None and mask.dim() == 4:
        same_BT = torch.diagonal(mask[:, 0], offset=-1, dim1=1, dim2=2) > 0
        return torch.cat([torch.ones_like(same_BT[:, :1]), ~same_BT], dim=1)
    if positions is None:
        return None
    same_BT = positions[:, 1:] == positions[:, :-1] + 1
    return torch.cat([torch.ones_like(same_BT[:, :1]), ~same_BT], dim=1)


def _groups(starts_BT: torch.Tensor) -> Iterator[list[Document]]:
    """All documents, those of similar length together, few enough for the memory."""
    documents = []
    for row, starts_T in enumerate(starts_BT):
        firsts = starts_T.nonzero()[:, 0].tolist()
        ends = [*firsts[1:], len(starts_T)]
        documents += [Document(row, first, last) for first, last in zip(firsts, ends, strict=True)]
    group: list[Document] = []
    for document in sorted(documents, key=lambda each: each.last - each.first):
        # Sorted by length, so the newest is the longest.
        if group and (document.last - document.first) * (len(group) + 1) > max(starts_BT.numel(), POSITIONS_AT_ONCE):
            yield group
            group = []
        group.append(document)
    yield group


def _cut_out(inputs: Tensors, documents: list[Document], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    shape = (len(documents), max(last - first for _, first, last in documents))
    found = {IDS: torch.zeros(shape, dtype=torch.long), MASK: torch.zeros(shape, dtype=torch.long)}
    for at, (row, first, last) in enumerate(documents):
        found[IDS][at, : last - first] = inputs[IDS][row, first:last]
        found[MASK][at, : last - first] = 1
    return completed(found, names)
