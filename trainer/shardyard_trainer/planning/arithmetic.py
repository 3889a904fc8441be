"""How a global batch is dealt to workers and cut into micro batches: exact integers, no rounding (docs/planning.md)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_STEPS = 2**53
"""More steps than a double can count are refused."""

DEFAULT_METRIC = "loss"
DEFAULT_PATIENCE = 3
"""Evaluations without an improvement after which training ends early."""


@dataclass(frozen=True)
class Batch:
    """A global batch on its workers: `samples_per_rank` sums to `global_batch_size`.

    Every rank makes `accumulation_steps` backward passes a step, of at most `micro_batch_size` samples each.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    workers: int
    samples_per_rank: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether micro × accumulation × workers is exactly the global batch."""
        return self.micro_batch_size * self.accumulation_steps * self.workers == self.global_batch_size


class BatchRefused(ValueError):
    """The numbers do not go together; `field` is relative to the spec, `reason` one of the contract's."""

    def __init__(self, message: str, *, field: str, reason: str) -> None:
        super().__init__(message)
        self.field = field
        self.reason = reason


def deal(global_batch_size: int, workers: int) -> tuple[int, ...]:
    """Samples of each rank: rank r takes ⌊rB/W⌋ up to, not including, ⌊(r+1)B/W⌋."""
    bounds = [rank * global_batch_size // workers for rank in range(workers + 1)]
    return tuple(high - low for low, high in itertools.pairwise(bounds))


def plan_batch(global_batch_size: int, workers: int, *, micro_batch_size: int | None, most_at_once: int) -> Batch:
    """Deals the batch; an unset micro batch becomes the most even cut of a share into parts of at most `most_at_once`.

    Raises BatchRefused if there are more workers than samples, or if a given micro batch does not divide.
    """
    if workers > global_batch_size:
        raise BatchRefused(
            f"{workers} workers cannot share a global_batch_size of {global_batch_size}: each needs at least one "
            f"sample; use at most {global_batch_size} workers, or a global_batch_size of {workers} or more",
            field="resources.workers",
            reason="SPEC_INVALID",
        )
    shares = deal(global_batch_size, workers)
    if micro_batch_size is None:
        accumulation = math.ceil(max(shares) / max(most_at_once, 1))
        return Batch(global_batch_size, math.ceil(max(shares) / accumulation), accumulation, workers, shares)
    if global_batch_size % (micro_batch_size * workers):
        raise BatchRefused(
            _does_not_divide(global_batch_size, workers, micro_batch_size),
            field="optimization.micro_batch_size",
            reason="BATCH_NOT_DIVISIBLE",
        )
    accumulation = global_batch_size // (micro_batch_size * workers)
    return Batch(global_batch_size, micro_batch_size, accumulation, workers, shares)


def _does_not_divide(global_batch_size: int, workers: int, micro_batch_size: int) -> str:
    accumulation = math.ceil(global_batch_size / (micro_batch_size * workers))
    product = micro_batch_size * accumulation * workers
    micro, steps, gang = nearest_that_works(global_batch_size, workers, micro_batch_size)
    return (
        f"micro_batch {micro_batch_size} x accumulation {accumulation} x workers {workers} = {product}, but "
        f"global_batch_size is {global_batch_size}; try micro_batch {micro}, accumulation {steps}, workers {gang}"
    )


def nearest_that_works(global_batch_size: int, workers: int, micro_batch_size: int) -> tuple[int, int, int]:
    """(micro batch, accumulation, workers) whose product is the batch, nearest by ratio; workers that divide stay."""
    gangs = [workers] if global_batch_size % workers == 0 else _nearest(_divisors(global_batch_size), workers, keep=8)
    best: tuple[float, int, int] | None = None
    for gang in gangs:
        for micro in _divisors(global_batch_size // gang):
            distance = abs(math.log(micro / micro_batch_size)) + abs(math.log(gang / workers))
            if best is None or (distance, gang, micro) < best:
                best = (distance, gang, micro)
    assert best is not None  # 1 divides everything
    _, gang, micro = best
    return micro, global_batch_size // (micro * gang), gang


def _nearest(numbers: Sequence[int], wanted: int, *, keep: int) -> list[int]:
    return sorted(numbers, key=lambda number: (abs(math.log(number / wanted)), number))[:keep]


def _divisors(number: int) -> list[int]:
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return low + [number // divisor for divisor in reversed(low) if divisor * divisor != number]


def total_steps(*, max_steps: int | None, epochs: float | None, num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps of the run: as given, or what it takes to see `epochs` × `num_samples` samples, rounded up.

    Raises BatchRefused over 2^53 steps.
    """
    if max_steps is not None:
        steps, field = max_steps, "optimization.max_steps"
    else:
        assert epochs is not None
        field = "optimization.epochs"
        # The small subtraction keeps 0.1 × 30 = 3.0000000000000004 from asking for a fourth step.
        wanted = epochs * num_samples / global_batch_size
        steps = max(1, math.ceil(wanted - 1e-9)) if wanted <= MAX_STEPS else MAX_STEPS + 1
    if steps > MAX_STEPS:
        given = f"{max_steps} steps" if max_steps is not None else f"{epochs} epochs of {num_samples} samples"
        raise BatchRefused(f"{given} are more than 2^53 steps; ask for fewer", field=field, reason="SPEC_INVALID")
    return steps


def evaluation_interval(total_steps: int, *, num_train_samples: int, global_batch_size: int) -> int:
    """Steps between two evaluations: a pass over the data, but at least a tenth of the run.

    If a pass is longer than the run, it is a tenth of the run. Evaluating a sample costs about a third of training on
    it, so more often would slow short runs down.
    """
    steps_a_pass = -(-num_train_samples // global_batch_size)
    tenth = max(-(-total_steps // 10), 1)
    return max(steps_a_pass, tenth) if steps_a_pass <= total_steps else tenth
