"""Integrated gradients (Sundararajan et al., 2017), checked by completeness: the shares add up to the output.

The gradients along a straight line from a baseline to the input are integrated in segments, each by Gauss and
Legendre's rule. What a segment's shares should add up to is known, the difference of the outputs at its ends: the
segments that miss it most are halved until the sum of all is close enough.
Shape suffixes: N rows, S segments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

TOLERANCE = 0.02
"""The sum of the shares may miss the difference of the outputs by this share of it."""

DEFAULT_STEPS = 256
FIRST_STEPS = 16
"""Gradients before the first check; no request may ask for fewer."""

_POSITIONS_AT_ONCE = 512
"""Positions in one pass: what the backward pass keeps of one is a hundred times what an answer needs."""

_MOST_NODES = 4
"""Gradients in a segment: exact for polynomials of degree 7, and cheap to do again in halves."""


_PLOTS = ("captum.attr._utils.visualization", "matplotlib", "matplotlib.colors")


class Unexplainable(Exception):
    """The model's output has no integrated gradients; the message says why."""


class Line(NamedTuple):
    """What is integrated over: from `start` to `end`, both [1, …], and the `output` [N] of rows [N, …] between them.

    `num_positions` are those of one row in a forward pass. The numbers along `vector_dim` (the vector of a token, the
    colours of a pixel) have one share together; None: each has its own.
    """

    start: torch.Tensor
    end: torch.Tensor
    output: Callable[[torch.Tensor], torch.Tensor]
    num_positions: int
    vector_dim: int | None = None


class Integral(NamedTuple):
    """The shares, fp64 in the shape of an input [1, …] without its `vector_dim`, and how well they add up.

    `error` is |sum of the shares - difference of the outputs| / |difference|, 0 if both are 0.
    """

    shares: torch.Tensor
    output: float
    baseline_output: float
    error: float
    steps: int

    @property
    def is_complete(self) -> bool:
        """Whether the shares add up."""
        return self.error <= TOLERANCE


@dataclass(frozen=True, eq=False)
class _Segment:
    """A part of the line, from 0 to 1, with its shares; `miss` is how far their sum is from what it should be."""

    begin: float
    end: float
    shares: torch.Tensor
    miss: float


def integrate(line: Line, most_steps: int) -> Generator[None, None, Integral]:
    """The shares of an input; others have a turn at each `yield`. Raises Unexplainable."""
    rows_at_once = max(_POSITIONS_AT_ONCE // line.num_positions, 1)
    # A turn is one pass. Of a long input a pass has few rows, so its segments are shorter instead.
    nodes = max(count for count in (1, 2, _MOST_NODES) if count <= rows_at_once)
    _check_gradients(line)
    yield
    parts = FIRST_STEPS // nodes
    outputs: dict[float, float] = {}
    segments = yield from _measured(
        line, [(at / parts, (at + 1) / parts) for at in range(parts)], outputs, nodes, rows_at_once
    )
    difference = outputs[1.0] - outputs[0.0]
    while True:
        room = most_steps // nodes - len(segments)
        worst = _to_halve(segments, difference, room)
        if not worst:
            break
        halves = [half for each in worst for half in _halves(each)]
        kept = [each for each in segments if each not in worst]
        segments = kept + (yield from _measured(line, halves, outputs, nodes, rows_at_once))
    total = torch.stack([each.shares for each in sorted(segments, key=lambda each: each.begin)]).sum(0)
    missed = abs(float(total.sum()) - difference)
    if not math.isfinite(missed):
        raise Unexplainable("its gradients for this instance are not numbers")
    error = missed / abs(difference) if difference else math.inf if missed else 0.0
    return Integral(total, outputs[1.0], outputs[0.0], error, nodes * len(segments))


def _check_gradients(line: Line) -> None:
    end = line.end.clone().requires_grad_()
    with torch.enable_grad():
        output = line.output(end)
        reaches = output.requires_grad and torch.autograd.grad(output.sum(), end, allow_unused=True)[0] is not None
    if not reaches:
        raise Unexplainable("gradients do not reach the input of this model: its code computes without them")
    if not math.isfinite(value := float(output.detach())):
        raise Unexplainable(f"its output for this instance is {value}, which is not a number that can be explained")


def _measured(
    line: Line, spans: Sequence[tuple[float, float]], outputs: dict[float, float], nodes: int, rows_at_once: int
) -> Generator[None, None, list[_Segment]]:
    """Segments with their shares; `outputs` gets those at their ends."""
    ends = sorted({at for span in spans for at in span} - outputs.keys())
    for first in range(0, len(ends), rows_at_once):
        some = ends[first : first + rows_at_once]
        with torch.no_grad():
            found = line.output(torch.cat([_point(line, at) for at in some]))
        outputs.update(zip(some, found.tolist(), strict=True))
        yield
    gradients = _method()(line.output)
    segments, together = [], rows_at_once // nodes
    for first in range(0, len(spans), together):
        chosen = spans[first : first + together]
        shares = gradients.attribute(
            torch.cat([_point(line, end) for _, end in chosen]),
            torch.cat([_point(line, begin) for begin, _ in chosen]),
            n_steps=nodes,
            method="gausslegendre",
        ).double()
        # Hundreds of segments are kept: the vectors of all tokens in each would take gigabytes.
        shares = shares if line.vector_dim is None else shares.sum(line.vector_dim)
        for (begin, end), own in zip(chosen, shares[:, None], strict=True):
            miss = float(own.sum()) - (outputs[end] - outputs[begin])
            segments.append(_Segment(begin, end, own.detach(), miss))
        yield
    return segments


class _Empty(ModuleType):
    """A module in which every name is an empty module."""

    def __getattr__(self, name: str) -> _Empty:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name)


@cache
def _method() -> Any:
    """Captum's class, which takes the output to explain."""
    # Captum imports matplotlib for its plots, which looks through the machine's fonts and writes a cache: a confined
    # process has neither the time nor the right. Nothing is drawn here, so captum gets empty modules for that.
    plots = {name: _Empty(name) for name in _PLOTS if name not in sys.modules}
    sys.modules.update(plots)
    try:
        from captum.attr import IntegratedGradients  # It takes a second: processes that explain nothing do without.
    finally:
        for name in plots:
            del sys.modules[name]
    return IntegratedGradients


def _point(line: Line, at: float) -> torch.Tensor:
    """The point of the line at a share of its length; exact at both ends."""
    return torch.lerp(line.start, line.end, at)


def _to_halve(segments: Sequence[_Segment], difference: float, room: int) -> list[_Segment]:
    """The segments that miss most: at most `room`, and no more than must be better; none if the sum is close enough."""
    most = TOLERANCE * abs(difference)
    if not abs(sum(each.miss for each in segments)) > most:
        return []
    left = sum(abs(each.miss) for each in segments)
    chosen: list[_Segment] = []
    for each in sorted(segments, key=lambda each: (-abs(each.miss), each.begin)):
        if left <= most or len(chosen) == room:
            break
        chosen.append(each)
        left -= abs(each.miss)
    return chosen


def _halves(segment: _Segment) -> list[tuple[float, float]]:
    middle = (segment.begin + segment.end) / 2
    return [(segment.begin, middle), (middle, segment.end)]
