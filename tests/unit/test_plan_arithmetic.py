"""Batch arithmetic and the memory formulas: exact integers, and the numbers that a plan shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.planning.arithmetic import (
    BatchRefused,
    deal,
    evaluation_interval,
    nearest_that_works,
    plan_batch,
    total_steps,
)
from shardyard_trainer.planning.deepspeed_config import BUCKET_ELEMENTS, LIVE_ELEMENTS, deepspeed_config
from shardyard_trainer.planning.memory import Gang, Shape, Ways, estimate, positions_that_fit, states
from shardyard_trainer.planning.placement import Placement, place

SMALL = Shape(
    num_parameters=10**6, num_trainable=10**6, num_layers=2, width=64, num_logits=1000, chunk=256,
    live_parameters=10**5, can_recompute=True,
)  # fmt: skip
LARGE = replace(SMALL, num_parameters=10**9, num_trainable=10**9, num_layers=20, width=2048, live_parameters=5 * 10**7)
GIB = 2**30


def placed(shape: Shape, gang: Gang, *, length: int = 128, node_bytes: int = 0, **wanted: int | bool) -> Placement:
    return place(spec_pb2.Parallelism(**wanted), shape, gang, length=length, node_bytes=node_bytes, kind="gpt2")  # type: ignore[arg-type]


def reason(found: Placement, name: str) -> tuple[str, str]:
    (decision,) = [each for each in found.decisions if each.field == f"spec.parallelism.{name}"]
    return decision.value, decision.reason


@given(batch=st.integers(1, 5000), workers=st.integers(1, 64))
def test_shares_sum_to_the_batch_and_differ_by_at_most_one(batch: int, workers: int) -> None:
    shares = deal(batch, workers)
    assert sum(shares) == batch
    assert max(shares) - min(shares) <= 1


@given(batch=st.integers(1, 2000), workers=st.integers(1, 64), micro=st.integers(1, 3000))
def test_a_proposal_always_multiplies_to_the_batch(batch: int, workers: int, micro: int) -> None:
    proposed_micro, accumulation, gang = nearest_that_works(batch, workers, micro)
    assert proposed_micro * accumulation * gang == batch
    assert gang == workers or batch % workers != 0


@given(batch=st.integers(1, 5000), workers=st.integers(1, 64), most=st.integers(1, 300))
def test_an_unset_micro_batch_covers_every_share_within_its_limit(batch: int, workers: int, most: int) -> None:
    if workers > batch:
        return
    plan = plan_batch(batch, workers, micro_batch_size=None, most_at_once=most)
    assert plan.micro_batch_size <= most
    assert plan.micro_batch_size * plan.accumulation_steps >= max(plan.samples_per_rank)
    assert plan.micro_batch_size * (plan.accumulation_steps - 1) < max(plan.samples_per_rank)


def test_the_message_names_the_product_and_the_nearest_that_works() -> None:
    with pytest.raises(BatchRefused) as refused:
        plan_batch(64, 3, micro_batch_size=6, most_at_once=10)
    assert str(refused.value) == (
        "micro_batch 6 x accumulation 4 x workers 3 = 72, but global_batch_size is 64; "
        "try micro_batch 8, accumulation 2, workers 4"
    )
    assert refused.value.reason == "BATCH_NOT_DIVISIBLE"


@pytest.mark.parametrize(
    ("batch", "workers", "micro", "reason"),
    [
        (64, 3, 16, "BATCH_NOT_DIVISIBLE"),
        (64, 1, 128, "BATCH_NOT_DIVISIBLE"),
        (2, 3, None, "SPEC_INVALID"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(batch: int, workers: int, micro: int | None, reason: str) -> None:
    with pytest.raises(BatchRefused) as refused:
        plan_batch(batch, workers, micro_batch_size=micro, most_at_once=8)
    assert refused.value.reason == reason


def test_workers_that_do_not_divide_are_accepted_without_a_micro_batch() -> None:
    plan = plan_batch(64, 3, micro_batch_size=None, most_at_once=16)
    assert plan.samples_per_rank == (21, 21, 22)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.is_even) == (11, 2, False)


def test_steps_come_from_epochs_rounded_up() -> None:
    assert total_steps(max_steps=None, epochs=2, num_samples=100, global_batch_size=32) == 7
    assert total_steps(max_steps=None, epochs=0.1, num_samples=30, global_batch_size=1) == 3
    assert total_steps(max_steps=5, epochs=None, num_samples=100, global_batch_size=32) == 5


def test_more_steps_than_a_double_counts_are_refused() -> None:
    with pytest.raises(BatchRefused, match=r"2\^53"):
        total_steps(max_steps=None, epochs=1e300, num_samples=100, global_batch_size=1)


@pytest.mark.parametrize(
    ("stage", "workers", "bf16", "bytes_per_parameter"),
    [(0, 1, False, 16), (1, 2, False, 14), (2, 4, False, 11), (1, 1, True, 16), (2, 2, True, 9)],
)
def test_states_follow_the_formulas(stage: int, workers: int, bf16: bool, bytes_per_parameter: int) -> None:
    assert sum(states(SMALL, zero_stage=stage, workers=workers, bf16=bf16)) == bytes_per_parameter * 10**6


@pytest.mark.parametrize(
    ("shape", "workers", "bf16", "available", "stage"),
    [
        (SMALL, 1, False, 0, 0),
        (SMALL, 2, False, 0, 1),
        (SMALL, 1, True, 0, 1),
        (SMALL, 2, False, 10**12, 1),
        (SMALL, 4, False, 870 * 10**6, 1),
        # No stage suffices, and stage 3 takes most, as it gathers all of so small a model.
        (SMALL, 4, False, 800 * 10**6, 1),
        (LARGE, 4, False, 21_100 * 10**6, 3),
    ],
)
def test_the_stage_is_a_memory_decision(shape: Shape, workers: int, bf16: bool, available: int, stage: int) -> None:
    gang = Gang(workers=workers, bf16=bf16, on_gpu=bf16, available=available)
    found = placed(shape, gang)
    assert found.ways.stage == stage
    value, why = reason(found, "zero_stage")
    assert value == str(stage)
    assert ("at stage 2 they would take 1" in why) == (stage == 3)
    # The resolved spec has the same reason as the one that left it out.
    assert placed(shape, gang, zero_stage=stage).decisions == found.decisions
    assert reason(placed(shape, gang, zero_stage=2), "zero_stage")[1] == "as the spec has it"


@pytest.mark.parametrize(
    ("available_gib", "node_gib", "workers", "ways"),
    [
        (80, 0, 1, Ways(1)),
        (16, 0, 1, Ways(1, offloads=True)),
        (16, 10, 1, Ways(1)),
        (11, 0, 2, Ways(2)),
        (8, 0, 2, Ways(3, offloads=True)),
        (0, 0, 2, Ways(1)),
    ],
)
def test_an_optimizer_leaves_a_gpu_if_the_states_fit_then(
    available_gib: int, node_gib: int, workers: int, ways: Ways
) -> None:
    gang = Gang(workers=workers, bf16=True, on_gpu=True, available=available_gib * GIB)
    found = placed(LARGE, gang, node_bytes=node_gib * GIB)
    assert found.ways._replace(recomputes=False) == ways
    value, why = reason(found, "offload_optimizer")
    assert value == str(ways.offloads).lower()
    if ways.offloads:
        assert "go to the node" in why
        need = estimate(LARGE, gang, ways)
        assert need.states == need.parameters + need.gradients < need.optimizer
        assert need.offloaded == 16 * 10**9 // workers
        assert need.total <= 0.85 * gang.available


def test_an_optimizer_stays_where_nothing_else_is() -> None:
    on_cpu = Gang(workers=2, bf16=False, on_gpu=False, available=13 * 10**9)
    assert placed(LARGE, on_cpu).ways == Ways(3)
    # Given, it is taken, and changes no number: a worker computes in the node's memory.
    assert placed(LARGE, on_cpu, offload_optimizer=True, zero_stage=3).ways == Ways(3, offloads=True)
    assert estimate(LARGE, on_cpu, Ways(2, offloads=True)) == estimate(LARGE, on_cpu, Ways(2))
    alone = Gang(workers=1, bf16=False, on_gpu=False, available=0)
    assert placed(SMALL, alone).ways == Ways(0)
    assert placed(SMALL, alone, offload_optimizer=True).ways == Ways(1, offloads=True)


def test_what_cannot_be_is_refused_by_its_field() -> None:
    gang = Gang(workers=1, bf16=True, on_gpu=True, available=16 * GIB)
    for shape, node_bytes, wanted, words in (
        (SMALL, 0, {"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer: at zero_stage 0 every worker"),
        (replace(SMALL, can_recompute=False), 0, {"activation_checkpointing": True}, "layers of this gpt2 again"),
        (LARGE, GIB, {"offload_optimizer": True}, r"offload_optimizer: the optimizer takes 16,000,000,000 bytes"),
    ):
        with pytest.raises(SpecError, match=words):
            placed(shape, gang, node_bytes=node_bytes, **wanted)


def test_layers_are_computed_again_if_one_sample_is_too_much() -> None:
    gang = Gang(workers=1, bf16=True, on_gpu=True, available=24 * GIB)
    short, long = placed(LARGE, gang, length=512), placed(LARGE, gang, length=8192)
    assert (short.ways.recomputes, long.ways.recomputes) == (False, True)
    assert reason(short, "activation_checkpointing")[1].startswith("a sample of 512 positions has")
    assert "computed again they are" in reason(long, "activation_checkpointing")[1]
    fitting = positions_that_fit(LARGE, gang, long.ways)
    assert fitting is not None and fitting >= 8192
    fixed = placed(replace(LARGE, can_recompute=False), gang, length=8192)
    assert not fixed.ways.recomputes and "cannot be computed again" in reason(fixed, "activation_checkpointing")[1]
    # 59 D L bytes a position in bf16; then 2 D of each layer, and the whole of one.
    kept, again = (estimate(LARGE, gang, Ways(1, recomputes=each), positions=10) for each in (False, True))
    assert kept.activations == 10 * 59 * 2048 * 20
    assert again.activations == 10 * (59 * 2048 + 2 * 2048 * 20)


def test_stage_3_gathers_and_collects_up_to_its_limits_and_exports_three_models() -> None:
    on_cpu = Gang(workers=4, bf16=False, on_gpu=False, available=0)
    small, large = (estimate(shape, on_cpu, Ways(3)) for shape in (SMALL, LARGE))
    # A quarter of each, all of a small model gathered twice, and its gradients three times in a bucket.
    assert small.parameters == 4 * (250_000 + 2 * 10**6)
    assert small.gradients == 4 * (250_000 + 3 * 10**6)
    assert large.parameters == 4 * (250 * 10**6 + LIVE_ELEMENTS + BUCKET_ELEMENTS)
    assert large.gradients == 4 * (250 * 10**6 + 3 * BUCKET_ELEMENTS)
    wide = replace(LARGE, live_parameters=3 * LIVE_ELEMENTS)
    assert estimate(wide, on_cpu, Ways(3)).parameters == 4 * (250 * 10**6 + 3 * LIVE_ELEMENTS + BUCKET_ELEMENTS)
    # A GPU has the whole bucket, however small the model is.
    on_gpu = Gang(workers=4, bf16=True, on_gpu=True, available=0)
    assert estimate(SMALL, on_gpu, Ways(3)).gradients == 2 * (250_000 + BUCKET_ELEMENTS + 10**6)
    assert [estimate(SMALL, on_cpu, Ways(stage)).export for stage in range(4)] == [4e6, 8e6, 8e6, 12e6]
    config = deepspeed_config(zero_stage=3, clip=1.0, precision="fp32", micro_batch_size=1, workers=4, on_gpu=False)
    settings = config["zero_optimization"]
    assert settings["stage3_max_live_parameters"] == settings["stage3_max_reuse_distance"] == LIVE_ELEMENTS


def test_only_states_that_exceed_memory_do_not_fit() -> None:
    def verdict(available: int) -> int:
        gang = Gang(workers=1, bf16=False, on_gpu=False, available=available)
        return estimate(SMALL, gang, Ways(0), positions=4096).verdict

    assert verdict(0) == plan_pb2.MEMORY_VERDICT_UNSPECIFIED
    assert verdict(15 * 10**6) == plan_pb2.MEMORY_VERDICT_NO_FIT
    assert verdict(17 * 10**6) == plan_pb2.MEMORY_VERDICT_TIGHT
    assert verdict(10**9) == plan_pb2.MEMORY_VERDICT_FITS


@pytest.mark.parametrize(
    ("steps", "samples", "expected"),
    [(434, 6920, 217), (217, 6920, 217), (600, 10**6, 60), (120, 160, 12), (3, 10**6, 1), (1, 1, 1)],
)
def test_evaluations_come_once_a_pass_and_at_most_ten_times(steps: int, samples: int, expected: int) -> None:
    assert evaluation_interval(steps, num_train_samples=samples, global_batch_size=32) == expected
