"""How a format compares with the model: its task's metrics, the time of a sample, and how far its outputs are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from shardyard_trainer.exporting.network import MASK, Compute, Tensors, asking, input_names
from shardyard_trainer.inputs.base import INSTANCES_AT_ONCE, POSITIONS_AT_ONCE, SampleRef, Samples
from shardyard_trainer.tasks.base import Graph, Prepared
from shardyard_trainer.tasks.module import HuggingFaceModule

TIMED_SAMPLES = 24
TIMED_S = 20.0
"""No further sample is timed after so many seconds."""

_TIMES = 2
# With all logits of a vocabulary in memory, and a few copies of them.
_POSITIONS_WITH_LOGITS = 1024


class TooSlow(Exception):
    """Measuring would take longer than others can wait; the text says how far it came."""


class Measured:
    """A prepared task with its module, as the original that formats are compared with. The module is on the CPU.

    At `deadline_s`, by the monotonic clock, measuring ends with TooSlow.
    """

    def __init__(
        self,
        task: Prepared,
        module: HuggingFaceModule,
        graph: Graph,
        samples: Samples,
        *,
        deadline_s: float | None = None,
    ) -> None:
        self.task = task
        self.module = module
        self.graph = graph
        self.samples = samples
        self._deadline_s = deadline_s
        self.names = input_names(task.choice.config)
        lengths = samples.lengths()
        number = samples.num_samples
        self._order = np.arange(number) if lengths is None else np.argsort(-lengths, kind="stable")

    def metrics(self, compute: Compute | None = None) -> dict[str, float]:
        """The task's metrics over all samples, of the module itself or of another network."""
        module = self.module if compute is None else asking(self.module, self.graph, self.names, compute)
        gatherer = self.task.metrics()
        size = self._samples_at_once()
        with torch.no_grad():
            for first in range(0, len(self._order), size):
                batch = self.samples.micro_batch(_refs(self._order[first : first + size]))
                gatherer.update(batch, module(**batch.inputs, return_outputs=True))
                if self._deadline_s is not None and time.monotonic() > self._deadline_s:
                    share = min(1.0, (first + size) / len(self._order))
                    raise TooSlow(
                        f"measuring it takes too long: {share:.0%} of the evaluation data in the time there is"
                    )
        return self.task.metrics().compute([gatherer.part()])

    def examples(self) -> list[list[Tensors]]:
        """Inputs of the network for real samples, in batches of several sizes and lengths; the first is of two."""
        order = self._order
        last, middle = len(order) - 1, len(order) // 2
        chosen: Sequence[Sequence[int]] = ([0, last], [last], [middle, 0, last], [middle], [0])
        found = [self._inputs_of(order[list(each)]) for each in chosen]
        # Samples may all be equally long: a graph that works at their length alone would not be noticed.
        return [*found, [_beginning(inputs) for inputs in found[0]]]

    def difference(self, compute: Compute, examples: Sequence[Sequence[Tensors]]) -> float:
        """How far another network's outputs are from the module's, relative to the largest (at least 1). NaN counts."""
        worst = 0.0
        with torch.no_grad():
            for inputs in (each for batch in examples for each in batch):
                wanted, found = self.module.network(inputs), compute(inputs)
                for name, axes in self.graph.outputs.items():
                    worst = max(worst, _difference(wanted[name], found[name], inputs, axes))
        return worst

    def latency_s(self, compute: Compute) -> float:
        """Seconds for one sample alone, the median over samples of all lengths, on the threads that it has."""
        chosen = np.linspace(0, len(self._order) - 1, min(TIMED_SAMPLES, len(self._order))).round().astype(int)
        found: list[float] = []
        until_s = time.monotonic() + TIMED_S
        with torch.no_grad():
            for index in self._order[chosen]:
                inputs = self._inputs_of(np.asarray([index]))
                _run(compute, inputs)  # The first time its memory is made.
                found.append(min(_run(compute, inputs) for _ in range(_TIMES)))
                if time.monotonic() > until_s:
                    break
        return statistics.median(found)

    def own(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """The module's network, as a `Compute`."""
        return self.module.network(inputs)

    def _inputs_of(self, indices: np.ndarray) -> list[Tensors]:
        """The calls that the module makes to its network for some samples, taken down."""
        taken: list[Tensors] = []

        def take(inputs: Tensors) -> dict[str, torch.Tensor]:
            taken.append(inputs)
            return self.module.network(inputs)

        batch = self.samples.micro_batch(_refs(indices))
        with torch.no_grad():
            asking(self.module, self.graph, self.names, take)(**batch.inputs, return_outputs=True)
        return taken

    def _samples_at_once(self) -> int:
        lengths = self.samples.lengths()
        longest = self.task.length if lengths is None or not len(lengths) else max(int(lengths.max()), 1)
        positions = _POSITIONS_WITH_LOGITS if self.task.footprint().num_logits else POSITIONS_AT_ONCE
        return max(1, min(INSTANCES_AT_ONCE, positions // max(longest, 1)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _beginning(inputs: Tensors) -> Tensors:
    """The first half of each sample; a picture as it is."""
    if MASK not in inputs:
        return inputs
    length = (inputs[MASK].shape[1] + 1) // 2
    return {name: tensor[:, :length] for name, tensor in inputs.items()}


def _run(compute: Compute, inputs: Sequence[Tensors]) -> float:
    started_s = time.perf_counter()
    for each in inputs:
        compute(each)
    return time.perf_counter() - started_s


def _difference(wanted: torch.Tensor, found: torch.Tensor, inputs: Tensors, axes: tuple[str, ...]) -> float:
    wanted, found = wanted.float(), found.float()
    if "length" in axes:
        is_real_BT = inputs["attention_mask"] > 0
        wanted, found = wanted[is_real_BT], found[is_real_BT]
    if wanted.shape != found.shape or not found.isfinite().all():
        return float("inf")
    return float((wanted - found).abs().max()) / max(1.0, float(wanted.abs().max()))


def _refs(indices: np.ndarray) -> list[SampleRef]:
    return [SampleRef(0, index) for index in indices.tolist()]
