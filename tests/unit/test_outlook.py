"""What a run says of the time that is left."""

from __future__ import annotations

import pytest

from shardyard_trainer.training.outlook import Course, Outlook


def outlook(**changes: float) -> Outlook:
    course = {
        "total_steps": 100,
        "evaluate_every": 25,
        "evaluation_tokens": 4000.0,
        "checkpoint_every": 0,
        "apart_s": 60.0,
        **changes,
    }
    return Outlook(Course(**course))  # type: ignore[arg-type]


def test_nothing_is_said_before_the_first_step() -> None:
    assert outlook().left_s(0) == 0


def test_the_first_step_of_a_process_counts_only_until_there_is_another() -> None:
    run = outlook(evaluation_tokens=0.0)
    run.stepped(10.0, 100)
    assert run.left_s(1) == pytest.approx(990)
    run.stepped(1.0, 100)
    assert run.left_s(2) == pytest.approx(98)
    run.stepped(3.0, 100)
    assert run.left_s(3) == pytest.approx(97 * 2)


def test_evaluations_checkpoints_and_the_export_count_as_they_were_measured() -> None:
    run = outlook(checkpoint_every=10)
    for _ in range(2):
        run.stepped(1.0, 100)
    # A third of training on as many tokens: 4,000 tokens in 13.3 s, at the steps 25, 50, 75 and at the end.
    assert run.left_s(2) == pytest.approx(98 + 4 * 4000 / 100 / 3)
    run.evaluated(5.0, 1000)
    assert run.left_s(2) == pytest.approx(98 + 4 * 20)
    run.saved(0.5)
    run.exported(7.0)
    assert run.left_s(2) == pytest.approx(98 + 4 * 20 + 10 * 0.5 + 7)
    assert run.left_s(60) == pytest.approx(40 + 2 * 20 + 5 * 0.5 + 7)
    assert run.left_s(100) == pytest.approx(0 + 20 + 0.5 + 7)


def test_checkpoints_that_the_clock_decides_are_at_most_one_a_tenth() -> None:
    slow, fast = outlook(evaluation_tokens=0.0), outlook(evaluation_tokens=0.0)
    for run, seconds in ((slow, 30.0), (fast, 0.6)):
        for _ in range(2):
            run.stepped(seconds, 100)
        run.saved(2.0)
    assert slow.left_s(50) == pytest.approx(50 * 30 + (5 + 1) * 2)
    assert fast.left_s(50) == pytest.approx(50 * 0.6 + (0.5 + 1) * 2)
