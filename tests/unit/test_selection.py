"""Which evaluation is the best, and when training ends early; the state of a selection is all that it knows."""

from __future__ import annotations

import json
import math

import pytest

from shardyard_trainer.training.selection import Selection, SelectionPolicy

LOSS = SelectionPolicy(select_best=True)
ACCURACY = SelectionPolicy("accuracy", 1, select_best=True)


def walk(policy: SelectionPolicy, values: list[float], *, cut_at: int | None = None) -> tuple[int | None, int]:
    """The best step, and the step after which training ended, 0: it did not; steps count by ten. Each evaluation ends
    in a new life if `cut_at` is its place."""
    selection = Selection(policy, state={})
    for place, value in enumerate(values):
        selection.see(10 * place + 10, {policy.metric: value})
        if place == cut_at:
            selection = Selection(policy, state=json.loads(json.dumps(selection.state_dict())))
        if selection.is_over:
            break
    ended = selection.seen.step if selection.seen and selection.is_over else 0
    return selection.best.step if selection.best else None, ended


@pytest.mark.parametrize(
    ("policy", "values", "best"),
    [
        (LOSS, [3, 2, 2.5], 20),
        (ACCURACY, [0.3, 0.2, 0.9], 30),
        (LOSS, [2, 1, 1, 1], 20),
        (ACCURACY, [0.5, 0.5], 10),
        (LOSS, [math.nan, 2, math.nan], 20),
        (LOSS, [math.inf, math.inf], None),
        (ACCURACY, [math.inf, 0.5], 20),
        (LOSS, [], None),
    ],
)
def test_the_best_is_the_first_that_no_other_one_beats(
    policy: SelectionPolicy, values: list[float], best: int | None
) -> None:
    assert walk(policy, values)[0] == best


@pytest.mark.parametrize(
    ("patience", "min_delta", "values", "ended"),
    [
        (1, 0.0, [3, 2, 2], 30),
        (2, 0.0, [3, 2, 2, 1, 2, 2], 60),
        (3, 0.0, [3, 2, 2, 2], 0),
        (0, 0.0, [1, 2, 3, 4, 5, 6, 7, 8], 0),
        (1, 0.5, [3, 2.6], 20),
        # Many small steps are a large one: compared with the best alone, this run would end at 30.
        (2, 0.5, [3, 2.7, 2.4, 2.2, 1.8], 0),
        (2, 0.0, [math.nan, math.nan, 1], 20),
    ],
)
def test_training_ends_after_so_many_evaluations_without_an_improvement(
    patience: int, min_delta: float, values: list[float], ended: int
) -> None:
    policy = SelectionPolicy(patience=patience, min_delta=min_delta)
    assert walk(policy, values)[1] == ended
    for cut_at in range(len(values)):
        assert walk(policy, values, cut_at=cut_at) == walk(policy, values)


def test_weights_that_could_not_be_kept_are_not_the_best() -> None:
    selection = Selection(LOSS, state={})
    selection.see(10, {"loss": 2.0})
    selection.see(20, {"loss": 1.0})
    assert selection.needs_checkpoint(20)
    selection.lose(20)
    assert selection.best is not None and selection.best.step == 10 and not selection.needs_checkpoint(20)


def test_a_run_that_ends_early_says_why() -> None:
    selection = Selection(SelectionPolicy("f1", 1, patience=2, min_delta=0.01), state={})
    for step, value in ((10, 0.5), (20, 0.505), (30, 0.4)):
        selection.see(step, {"f1": value, "loss": 1.0})
    assert selection.why_over(100) == (
        "f1 did not improve by more than 0.01 in 2 evaluations: its best value is 0.505, of step 20; "
        "training ends after step 30 of 100"
    )


def test_the_newest_and_the_best_evaluation_come_back_with_all_their_metrics() -> None:
    selection = Selection(LOSS, state={})
    selection.see(10, {"loss": 1.0, "f1": 0.1 + 0.2})
    selection.see(20, {"loss": 2.0, "f1": math.nan})
    after = Selection(LOSS, state=json.loads(json.dumps(selection.state_dict())))
    assert after.best == (10, {"loss": 1.0, "f1": 0.1 + 0.2})
    assert after.metrics_at(20)["loss"] == 2.0 and math.isnan(after.metrics_at(20)["f1"])
    assert after.metrics_at(10) == {} and Selection(LOSS, state={}).metrics_at(0) == {}


def test_the_state_of_an_earlier_version_which_kept_the_value_alone_goes_on() -> None:
    selection = Selection(ACCURACY, state={"bar": 0.5, "without_improvement": 1, "seen_step": 20, "best": [10, 0.5]})
    assert selection.best == (10, {"accuracy": 0.5}) and not selection.metrics_at(20)
    selection.see(30, {"accuracy": 0.4, "loss": 1.0})
    assert selection.best.step == 10
    selection.see(40, {"accuracy": 0.6, "loss": 0.9})
    assert selection.best == (40, {"accuracy": 0.6, "loss": 0.9})
