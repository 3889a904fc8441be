"""The order of samples: pure, complete, and the same for every number of ranks."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.memory import ORDER_BYTES
from shardyard_trainer.training.order import Order, Stretch, deal, seed_for


def order_of(num_samples: int, batch_size: int, seed: int, has_lengths: bool) -> Order:
    lengths = np.random.default_rng(7).integers(3, 60, num_samples).astype(np.int32) if has_lengths else None
    return Order(num_samples=num_samples, batch_size=batch_size, seed=seed, lengths=lengths)


def stretch_of(num_samples: int) -> Stretch:
    return Stretch(np.zeros(num_samples, np.int64), np.arange(num_samples))


orders = st.builds(
    order_of,
    num_samples=st.integers(1, 400),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**53),
    has_lengths=st.booleans(),
)


@given(orders, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_data_epoch_has_each_sample_once(order: Order, num_epochs: int) -> None:
    num_steps = -(-num_epochs * order.num_samples // order.batch_size)
    stream = [ref for step in range(num_steps) for ref in order.global_batch(step).refs()]
    for data_epoch in range(num_epochs):
        part = stream[data_epoch * order.num_samples : (data_epoch + 1) * order.num_samples]
        assert Counter(part) == Counter(SampleRef(data_epoch, sample) for sample in range(order.num_samples))


@given(orders, st.integers(0, 50), st.integers(1, 6), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_ranks_share_the_same_global_batch_whatever_their_number(
    order: Order, step: int, world_size: int, micro_batch_size: int
) -> None:
    ranks = [
        order.rank_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    real = [[ref for micro in rank if not micro.is_dummy for ref in micro.samples] for rank in ranks]
    size = order.batch_size
    assert Counter(ref for rank in real for ref in rank) == Counter(order.global_batch(step).refs())
    assert [len(rank) for rank in real] == [
        (r + 1) * size // world_size - r * size // world_size for r in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1, "every rank calls backward equally often"
    assert all(1 <= len(micro.samples) <= micro_batch_size for rank in ranks for micro in rank)


@given(orders, st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_a_function_of_seed_and_step_alone(order: Order, step: int) -> None:
    fresh = Order(num_samples=order.num_samples, batch_size=order.batch_size, seed=order.seed, lengths=order.lengths)
    later = [order.global_batch(other).refs() for other in (step + 3, step, step + 1)][1]
    assert fresh.global_batch(step).refs() == later


def test_another_seed_and_another_data_epoch_have_another_order() -> None:
    first, other = (order_of(64, 8, seed, has_lengths=False) for seed in (0, 1))
    samples = [
        [ref.sample for ref in batch]
        for batch in (first.global_batch(0).refs(), other.global_batch(0).refs(), first.global_batch(8).refs())
    ]
    assert samples[0] != samples[1] and samples[0] != samples[2]


def test_batches_hold_similar_lengths_and_come_in_no_order_of_length() -> None:
    order = order_of(2000, 16, 0, has_lengths=True)
    assert order.lengths is not None
    spreads, means = [], []
    for step in range(100):
        lengths = [int(order.lengths[ref.sample]) for ref in order.global_batch(step).refs()]
        spreads.append(max(lengths) - min(lengths))
        means.append(sum(lengths) / len(lengths))
    assert np.median(spreads) <= 6, "a batch of random samples would spread over 50"
    assert means[:16] != sorted(means[:16])


def test_the_batch_after_an_odd_data_epoch_is_still_of_similar_lengths() -> None:
    order = order_of(1003, 16, 0, has_lengths=True)
    assert order.lengths is not None
    spreads = [
        np.ptp([order.lengths[ref.sample] for ref in order.global_batch(step).refs()]) for step in range(63, 125)
    ]
    assert np.median(spreads) <= 6


@given(st.lists(st.integers(1, 128), min_size=8, max_size=64), st.integers(2, 4))
def test_shares_are_balanced_in_tokens(values: list[int], world_size: int) -> None:
    lengths = np.array(values, dtype=np.int32)
    batch = stretch_of(len(values))
    tokens = [int(lengths[share.samples].sum()) for share in deal(batch, world_size, lengths)]
    assert max(tokens) - min(tokens) <= 2 * max(values)


def test_a_share_is_sorted_by_length() -> None:
    lengths = np.array([5, 1, 4, 2, 3, 6], dtype=np.int32)
    shares = deal(stretch_of(6), 2, lengths)
    assert [lengths[share.samples].tolist() for share in shares] == [[2, 3, 6], [1, 4, 5]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_far_larger_than_the_data_makes_no_heap_of_objects(world_size: int) -> None:
    batch_size = 400_000
    order = order_of(60, batch_size, 0, has_lengths=True)
    tracemalloc.start()
    try:
        micros = order.rank_batches(1, rank=0, world_size=world_size, micro_batch_size=512)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(micro.stretch) for micro in micros) == batch_size // world_size
    assert peak_bytes < ORDER_BYTES * batch_size * 1.1


def test_seeds_differ_by_every_part_and_are_the_same_everywhere() -> None:
    seeds = {seed_for(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(1, 2, 3) == seed_for(1, 2, 3) != seed_for(12, 3)


@pytest.mark.parametrize(("num_batches", "most"), [(284, 0.02), (1000, 0.02), (64, 0.08), (40, 0.10)])
def test_little_of_what_is_computed_is_padding(num_batches: int, most: float) -> None:
    generator = np.random.default_rng(3)
    lengths = np.clip(generator.normal(27, 11, num_batches * 32), 4, 64).astype(np.int32)
    order = Order(num_samples=len(lengths), batch_size=32, seed=0, lengths=lengths)
    batches = [lengths[order.global_batch(step).samples] for step in range(num_batches)]
    padded = sum(len(batch) * int(batch.max()) for batch in batches)
    assert 1 - int(lengths.sum()) / padded < most


@pytest.mark.parametrize("num_batches", [40, 284])
def test_long_samples_meet_others_in_the_next_pass(num_batches: int) -> None:
    order = order_of(num_batches * 32, 32, 0, has_lengths=True)
    assert order.lengths is not None
    longest = int(order.lengths.argmax())
    met = [set[int](), set[int]()]
    for step in range(2 * num_batches):
        batch = order.global_batch(step)
        if longest in batch.samples:
            met[step // num_batches] |= set(batch.samples.tolist()) - {longest}
    assert len(met[0] & met[1]) < len(met[0]) / 2
