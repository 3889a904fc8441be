"""Ratios with intervals: what the benches say in the end."""

from __future__ import annotations

import random

import pytest

from helpers.beside import script

measure = script("bench", "measure")


def test_the_interval_holds_the_true_ratio_of_noisy_blocks() -> None:
    rng = random.Random(1)
    noise = [rng.gauss(100, 5) for _ in range(40)]
    ratio = measure.ratio_of([1.1 * value * rng.gauss(1, 0.02) for value in noise], noise)
    assert ratio.low < 1.1 < ratio.high
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.num_pairs == 40


def test_what_slows_both_sides_alike_does_not_show() -> None:
    ratio = measure.ratio_of([10, 5, 20, 1], [20, 10, 40, 2])
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 0.5, 0.5)


def test_blocks_without_a_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure.ratio_of([1.0, 2.0], [1.0])


def test_a_quantile_is_one_of_the_values() -> None:
    assert measure.quantile([5, 1, 4, 2, 3], 0.5) == 3
    assert measure.quantile([1, 2], 0.99) == 2
