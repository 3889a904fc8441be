"""The policy's invariants (docs/scheduling.md) over random snapshots, and its choices by example."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.plain_policy import plain_admit, plain_place
from shardyard_coordinator.scheduling.explain import explain
from shardyard_coordinator.scheduling.policy import (
    Admission,
    Backfill,
    Constraint,
    NodeInfo,
    NodeState,
    PendingJob,
    Policy,
    RunningJob,
    Snapshot,
    Start,
    admit,
    admits,
    free_slots,
    ranked,
)

NOW = 1000
ACCELERATORS = ("cpu", "gpu")


T = TypeVar("T")


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    nodes = tuple(
        NodeInfo(f"n{index}", draw(st.integers(0, 9)), draw(st.sampled_from(ACCELERATORS)), 0, draw(_STATES))
        for index in range(draw(st.integers(0, 5)))
    )
    free = {node.id: node.slots for node in nodes}
    running = []
    for index in range(draw(st.integers(0, 3))):
        usable = [node for node in nodes if free[node.id] > 0]
        if usable:
            node = draw(st.sampled_from(usable))
            held = draw(st.integers(1, free[node.id]))
            free[node.id] -= held
            running.append(RunningJob(f"r{index}", 1, ((node.id, held),), 1))
    pending = tuple(
        PendingJob(
            job=f"p{index}",
            order=index,
            epoch=draw(st.integers(0, 2)),
            sizes=draw(st.sampled_from([(1,), (2,), (4,), (8,), (4, 2, 1), (16,)])),
            slots_per_worker=draw(st.sampled_from([1, 1, 2, 3])),
            accelerator=draw(st.sampled_from(ACCELERATORS)),
            priority=draw(st.integers(1, 4)),
            not_before=draw(st.sampled_from([0, 0, 0, NOW + 50])),
            avoid_nodes=draw(st.sampled_from([frozenset(), frozenset({"n0"})])),
        )
        for index in range(draw(st.integers(0, 8)))
    )
    return Snapshot(pending, tuple(running), nodes)


_STATES = st.sampled_from([NodeState.READY] * 4 + [NodeState.CORDONED, NodeState.DRAINING, NodeState.SUSPECT])


def starts_of(snapshot: Snapshot, policy: Policy = Policy()) -> list[Start]:  # noqa: B008
    return admit(snapshot, NOW, policy)[0]


def applied(snapshot: Snapshot, starts: Sequence[Start]) -> Snapshot:
    by_id = {job.job: job for job in snapshot.pending}
    started = {start.job for start in starts}
    gangs = [RunningJob(s.job, s.epoch, s.placement, by_id[s.job].slots_per_worker) for s in starts]
    left = tuple(job for job in snapshot.pending if job.job not in started)
    return replace(snapshot, pending=left, running=(*snapshot.running, *gangs))


@given(snapshots())
@settings(max_examples=300, deadline=None)
def test_no_slot_is_held_twice_and_every_gang_starts_whole_on_allowed_nodes(snapshot: Snapshot) -> None:
    starts = starts_of(snapshot)
    nodes = {node.id: node for node in snapshot.nodes}
    by_id = {job.job: job for job in snapshot.pending}
    held = dict.fromkeys(nodes, 0)
    for start in starts:
        job = by_id[start.job]
        assert start.workers in job.sizes and start.epoch == job.epoch + 1
        assert sum(workers for _, workers in start.placement) == start.workers
        assert len({node for node, _ in start.placement}) == len(start.placement)
        assert job.not_before <= NOW
        for node, workers in start.placement:
            assert workers > 0 and admits(nodes[node], job)
            held[node] += workers * job.slots_per_worker
    free = free_slots(snapshot)
    assert all(held[node] <= free[node] for node in nodes)


@given(snapshots(), st.sampled_from(Backfill), st.booleans())
@settings(max_examples=1000, deadline=None)
def test_what_is_remembered_of_a_class_changes_no_answer(
    snapshot: Snapshot, backfill: Backfill, connected: bool
) -> None:
    snapshot = replace(snapshot, connected=connected)
    assert admit(snapshot, NOW, Policy(backfill)) == plain_admit(snapshot, NOW, Policy(backfill))


@given(snapshots(), st.sampled_from(Backfill))
@settings(max_examples=300, deadline=None)
def test_a_pass_that_ends_when_nothing_is_left_starts_the_same(snapshot: Snapshot, backfill: Backfill) -> None:
    admission = Admission(snapshot, NOW, Policy(backfill))
    starts = []
    for job in ranked(snapshot.pending):
        if admission.is_over:
            break
        found = admission.consider(job)
        starts += [found] if isinstance(found, Start) else []
    assert starts == plain_admit(snapshot, NOW, Policy(backfill))[0]


def fastest(decide: Callable[[], T]) -> tuple[T, float]:
    """The answer, and the least CPU time of five: neighbours and the collector of garbage only ever add to it."""
    times = []
    for _ in range(5):
        begun = time.process_time()
        answer = decide()
        times.append(time.process_time() - begun)
    return answer, min(times)


def test_a_long_line_is_decided_in_one_look_at_each_class() -> None:
    nodes = tuple(NodeInfo(f"n{at:04}", 8, "gpu") for at in range(200))
    busy = tuple(RunningJob(f"r{at}", 1, ((node.id, 8),), 1) for at, node in enumerate(nodes[:-1]))
    sizes = [(8,), (4,), (2,), (1,), (16,)]
    line = tuple(PendingJob(f"p{at}", at, 0, sizes[at % 5], 1, "gpu") for at in range(20_000))
    (starts, waiting), took_s = fastest(lambda: admit(Snapshot(line, busy, nodes), NOW, Policy()))
    few, plain_s = fastest(lambda: plain_admit(Snapshot(line[:200], busy, nodes), NOW, Policy()))
    assert starts == few[0] and waiting[: len(few[1])] == few[1]
    # A hundred times the jobs in less than ten times the time.
    assert took_s < 10 * plain_s


@given(snapshots(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_rows_does_not_matter(snapshot: Snapshot, rng: random.Random) -> None:
    shuffled = Snapshot(
        tuple(rng.sample(snapshot.pending, len(snapshot.pending))),
        tuple(rng.sample(snapshot.running, len(snapshot.running))),
        tuple(rng.sample(snapshot.nodes, len(snapshot.nodes))),
    )
    assert admit(shuffled, NOW, Policy()) == admit(snapshot, NOW, Policy())


@given(snapshots())
@settings(max_examples=200, deadline=None)
def test_deciding_again_after_applying_starts_nothing_and_leaves_no_job_waiting_that_fits(snapshot: Snapshot) -> None:
    after = applied(snapshot, starts_of(snapshot))
    assert starts_of(after) == []
    free = free_slots(after)
    for job in after.pending:
        if job.not_before <= NOW:
            assert not any(plain_place(job, size, after.nodes, free) for size in job.sizes)


@given(snapshots(), st.sampled_from(Backfill))
@settings(max_examples=200, deadline=None)
def test_every_job_starts_or_has_a_reason_to_wait(snapshot: Snapshot, backfill: Backfill) -> None:
    policy = Policy(backfill)
    starting = {each.job for each in starts_of(snapshot, policy)}
    waiting = explain(snapshot, NOW, policy)
    assert starting | set(waiting) == {job.job for job in snapshot.pending}
    assert not starting & set(waiting)


@given(snapshots(), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_a_higher_priority_never_worsens_a_rank(snapshot: Snapshot, which: int) -> None:
    if which >= len(snapshot.pending):
        return
    raised = [replace(job, priority=5) if at == which else job for at, job in enumerate(snapshot.pending)]
    target = snapshot.pending[which].job
    before = [job.job for job in ranked(snapshot.pending)].index(target)
    assert [job.job for job in ranked(raised)].index(target) <= before


def test_another_process_with_another_hash_seed_decides_the_same() -> None:
    code = (
        "from shardyard_coordinator.scheduling.policy import *\n"
        "pending = tuple(PendingJob(f'p{i}', i % 7, 0, (i % 3 + 1,), 1, priority=i % 2,"
        " avoid_nodes=frozenset({f'n{i % 5}', 'n1'})) for i in range(30))\n"
        "nodes = tuple(NodeInfo(f'n{i}', 3 + i % 3) for i in range(6))\n"
        "starts, waiting = admit(Snapshot(pending, (), nodes), 5, Policy())\n"
        "print(starts, [(job.job, blocked) for job, blocked in waiting])\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def test_the_fullest_node_that_suffices_is_taken() -> None:
    nodes = (NodeInfo("a", 8), NodeInfo("b", 4), NodeInfo("c", 3))
    [start] = starts_of(Snapshot((PendingJob("p", 1, 0, (3,), 1),), (), nodes))
    assert start.placement == (("c", 3),)


def test_a_gang_larger_than_a_node_takes_the_emptiest_nodes_and_the_rest_tightly() -> None:
    nodes = (NodeInfo("a", 4), NodeInfo("b", 4), NodeInfo("c", 2), NodeInfo("d", 3))
    [start] = starts_of(Snapshot((PendingJob("p", 1, 0, (10,), 1),), (), nodes))
    assert start.placement == (("a", 4), ("b", 4), ("c", 2))


def test_a_worker_never_splits_over_nodes() -> None:
    nodes = (NodeInfo("a", 3), NodeInfo("b", 3))
    waiting = explain(Snapshot((PendingJob("p", 1, 0, (3,), 2),), (), nodes), NOW, Policy())
    assert waiting["p"].constraint is Constraint.NO_SUCH_NODE


JOB = PendingJob("p", 9, 0, (4,), 1)
BUSY = (RunningJob("r", 1, (("a", 3),), 1),)
REASONS = [
    (Snapshot((JOB,), (), (), connected=False), Constraint.CLUSTER_UNREACHABLE, "not connected"),
    (Snapshot((replace(JOB, not_before=NOW + 9),), (), (NodeInfo("a", 4),)), Constraint.NOT_BEFORE, "9 s"),
    (Snapshot((JOB,), (), (NodeInfo("a", 2),)), Constraint.NO_SUCH_NODE, "needs 4 slots"),
    (Snapshot((JOB,), BUSY, (NodeInfo("a", 4),)), Constraint.INSUFFICIENT_SLOTS, "needs 4 slots, 1 free"),
    (
        Snapshot(
            (replace(JOB, slots_per_worker=4, sizes=(1,)),), BUSY, (NodeInfo("a", 8, used=5), NodeInfo("b", 2, used=1))
        ),
        Constraint.FRAGMENTED,
        "needs 4 slots, 4 free, but not as its workers want them; 3 are held by others than this service",
    ),
    (
        Snapshot((JOB,), (), (NodeInfo("a", 4, used=9),)),
        Constraint.INSUFFICIENT_SLOTS,
        "needs 4 slots, 0 free; 4 are held by others than this service",
    ),
    (
        Snapshot(
            (replace(JOB, slots_per_worker=4, sizes=(1,)),),
            (RunningJob("r", 1, (("a", 2), ("b", 2)), 1),),
            (NodeInfo("a", 4), NodeInfo("b", 4)),
        ),
        Constraint.FRAGMENTED,
        "needs 4 slots, 4 free, but not",
    ),
]


@pytest.mark.parametrize(("snapshot", "constraint", "words"), REASONS, ids=[each[1].value for each in REASONS])
def test_the_first_constraint_that_fails_is_reported_with_numbers(
    snapshot: Snapshot, constraint: Constraint, words: str
) -> None:
    waiting = explain(snapshot, NOW, Policy())["p"]
    assert waiting.constraint is constraint
    assert words in waiting.message


def test_what_the_cluster_says_is_held_is_counted_once_with_what_the_gangs_hold() -> None:
    assert free_slots(Snapshot((), BUSY, (NodeInfo("a", 8, used=3), NodeInfo("b", 4, used=1)))) == {"a": 5, "b": 3}
    # A gang that is recorded, but has not reserved its slots yet.
    assert free_slots(Snapshot((), BUSY, (NodeInfo("a", 8, used=0),))) == {"a": 5}


def test_without_backfill_the_first_that_does_not_fit_holds_the_others() -> None:
    small = PendingJob("q", 10, 0, (1,), 1)
    snapshot = Snapshot((JOB, small), BUSY, (NodeInfo("a", 4),))
    assert [start.job for start in starts_of(snapshot)] == ["q"]
    assert starts_of(snapshot, Policy(Backfill.NONE)) == []
    assert explain(snapshot, NOW, Policy(Backfill.NONE))["q"].constraint is Constraint.RANK
