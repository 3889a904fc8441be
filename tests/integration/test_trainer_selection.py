"""Runs that end early, and that export their best step: exactly, whatever happens on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trainer_run import Scenario, run_gang, run_scenario, solo_gang

RUN: dict[str, Any] = {"evaluate_every": 4, "checkpoint_every": 100, "steps": 60, "metric": "goodness"}
"""The small model learns its few samples by heart: the evaluation is best early on."""


def warnings(scenario: Scenario, reason: str) -> list[str]:
    return [event.warning.message for event in scenario.events() if event.warning.reason == reason]


def weights(scenario: Scenario) -> dict[str, torch.Tensor]:
    return torch.load(Path(scenario.folder) / "model" / "weights.pt")  # type: ignore[no-any-return]


def times_computed(scenario: Scenario) -> int:
    """How often the evaluation data was evaluated, the canary's few batches apart."""
    phases = [event.phase.phase for event in scenario.events() if event.HasField("phase")]
    return phases.count("evaluating") - phases.count("canary")


def best_of(scenario: Scenario) -> int:
    return min(scenario.evaluations(), key=lambda each: each.metrics["loss"]).step


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_best_step_is_exported_as_it_was(tmp_path: Path, zero_stage: int) -> None:
    scenario = Scenario(str(tmp_path / "best"), zero_stage=zero_stage, select_best=True, **RUN)
    assert run_scenario(scenario, solo_gang()) is None
    best, final = best_of(scenario), scenario.evaluations()[-1]
    assert 4 <= best < 40
    (at_best,) = [each for each in scenario.evaluations() if each.step == best and not each.is_final]
    assert (final.step, final.is_final) == (best, True) and final.metrics == at_best.metrics
    assert best in {each.step for each in scenario.checkpoints()}
    assert times_computed(scenario) == len({each.step for each in scenario.evaluations()} | {RUN["steps"]})
    # A run of so many steps has nothing left to train: it exports that checkpoint.
    resumed = Scenario(
        str(tmp_path / "again"),
        zero_stage=zero_stage,
        epoch=2,
        resume=[str(scenario.attempt_dir / f"step-{best:09}")],
        **{**RUN, "steps": best},
    )
    assert run_scenario(resumed, solo_gang()) is None
    ours, theirs = weights(scenario), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_no_longer_improves_ends_in_good_order(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), patience=2, **RUN)
    assert run_scenario(scenario, solo_gang()) is None
    best = best_of(scenario)
    assert best + 8 < 60
    assert max(scenario.series()) == best + 8
    (message,) = warnings(scenario, "STOPPED_EARLY")
    assert f"of step {best}; training ends after step {best + 8} of 60" in message
    assert scenario.checkpoints()[-1].step == scenario.evaluations()[-1].step == best + 8
    assert [event.finished.step for event in scenario.events() if event.HasField("finished")] == [best + 8]
    assert scenario.evaluations()[-1].is_final and scenario.kinds()[-1] == "exported"
    # The evaluation that ended it is the job's: it is reported as that, and not computed again.
    assert times_computed(scenario) == len(scenario.evaluations()) - 1 == (best + 8) // 4


def test_a_run_to_its_last_step_evaluates_that_once_and_a_resume_for_the_export_alone_never(tmp_path: Path) -> None:
    run = {**RUN, "steps": 8}
    scenario = Scenario(str(tmp_path), **run)
    assert run_scenario(scenario, solo_gang()) is None
    assert [(each.step, each.is_final) for each in scenario.evaluations()] == [(4, False), (8, True)]
    assert times_computed(scenario) == 2
    again = Scenario(str(tmp_path), epoch=2, resume=[str(scenario.attempt_dir / "step-000000008")], **run)
    assert run_scenario(again, solo_gang()) is None
    assert again.evaluations() == [scenario.evaluations()[-1]] and times_computed(again) == 0


def test_two_ranks_that_are_interrupted_end_where_an_undisturbed_run_ends(tmp_path: Path) -> None:
    def scenario(name: str, **changes: Any) -> Scenario:
        run = {**RUN, "checkpoint_every": 3, "zero_stage": 1, "world_size": 2, "dropout": 0.1, "patience": 3}
        return Scenario(str(tmp_path / name), select_best=True, **{**run, **changes})

    whole = scenario("whole")
    assert run_gang(tmp_path / "gang-1", [whole]) == [0, 0]
    best, end = best_of(whole), max(whole.series())
    assert end == best + 12 < 60

    def kept(scenario: Scenario, step: int) -> str:
        return str(scenario.attempt_dir / f"step-{step:09}")

    # Cut between the best step, whose checkpoint is then of the attempt before, and the end.
    cut = scenario("cut", stop_at=best + 7)
    after = scenario("cut", epoch=2, resume=[kept(cut, (best + 6) // 3 * 3), kept(cut, best)])
    ended = scenario("cut", epoch=3, resume=[kept(after, end), kept(cut, best)])
    assert run_gang(tmp_path / "gang-2", [cut, after, ended]) == [0, 0]
    assert max(after.series()) == end and after.evaluations()[-1] == whole.evaluations()[-1]
    assert weights(after).keys() == weights(whole).keys()
    assert all(torch.equal(weights(after)[name], tensor) for name, tensor in weights(whole).items())
    # Only the export was lost.
    assert not ended.series() and not warnings(ended, "STOPPED_EARLY")
    assert ended.evaluations()[-1] == whole.evaluations()[-1]
    assert all(torch.equal(weights(ended)[name], tensor) for name, tensor in weights(whole).items())


def test_if_the_best_checkpoint_is_lost_the_last_step_is_exported_and_a_warning_says_so(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), select_best=True, patience=2, **RUN)
    assert run_scenario(scenario, solo_gang()) is None
    best, end = best_of(scenario), max(scenario.series())
    shutil.rmtree(scenario.attempt_dir / f"step-{best:09}")
    again = Scenario(str(tmp_path), select_best=True, patience=2, epoch=2, **RUN)
    again.resume = [str(scenario.attempt_dir / f"step-{end:09}")]
    assert run_scenario(again, solo_gang()) is None
    (message,) = warnings(again, "BEST_STEP_LOST")
    assert f"of step {best}" in message
    assert (again.evaluations()[-1].step, again.evaluations()[-1].is_final) == (end, True)


def test_a_best_step_that_the_disk_had_no_room_for_is_not_exported(tmp_path: Path) -> None:
    whole = Scenario(str(tmp_path / "whole"), select_best=True, **RUN)
    assert run_scenario(whole, solo_gang()) is None
    best = best_of(whole)
    kept = [each.step for each in whole.checkpoints()]
    full = Scenario(
        str(tmp_path / "full"), select_best=True, full_at=("manifest.written", [kept.index(best) + 1], 0), **RUN
    )
    assert run_scenario(full, solo_gang()) is None
    assert best not in {each.step for each in full.checkpoints()}
    losses = {each.step: each.metrics["loss"] for each in full.evaluations() if each.step != best}
    assert full.evaluations()[-1].step == min(losses, key=lambda step: losses[step])
