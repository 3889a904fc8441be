"""A resume is exact, and a checkpoint is whole or it does not exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.trainer_run import Scenario, run_gang, run_scenario, solo_gang
from shardyard.v1 import job_pb2
from shardyard_trainer.training.checkpoint import read_manifest

CORRUPT = job_pb2.CheckpointChanged.CHANGE_CORRUPT


def after(scenario: Scenario, step: int) -> dict[int, float]:
    return {number: loss for number, loss in scenario.series().items() if number > step}


@pytest.mark.parametrize(("zero_stage", "task"), [(0, "gpt2"), (1, "gpt2"), (3, "lora"), (2, "taught")])
def test_losses_after_a_resume_are_those_of_an_undisturbed_run_bit_for_bit(
    tmp_path: Path, zero_stage: int, task: str
) -> None:
    whole = Scenario(str(tmp_path / "whole"), zero_stage=zero_stage, dropout=0.1, task=task)
    assert run_scenario(whole, solo_gang()) is None
    first = Scenario(str(tmp_path / "cut"), zero_stage=zero_stage, dropout=0.1, stop_at=13, task=task)
    assert run_scenario(first, solo_gang()) is None
    checkpoint = first.checkpoints()[-1]
    second = Scenario(first.folder, zero_stage=zero_stage, dropout=0.1, epoch=2, resume=[checkpoint.path], task=task)
    assert run_scenario(second, solo_gang()) is None
    assert checkpoint.step >= 13
    assert second.series() == after(whole, checkpoint.step)
    assert second.series("grad_norm") == {
        step: norm for step, norm in whole.series("grad_norm").items() if step > checkpoint.step
    }


def test_two_ranks_resume_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    def scenario(name: str, stage: int, **changes: Any) -> Scenario:
        folder = str(tmp_path / f"{name}-{stage}")
        task = {0: "norms", 1: "bert", 2: "lora"}[stage]
        return Scenario(folder, zero_stage=stage, world_size=2, dropout=0.1, task=task, **changes)

    wholes = [scenario("whole", stage) for stage in (0, 1, 2)]
    firsts = [scenario("cut", stage, stop_at=13) for stage in (0, 1, 2)]
    seconds = [
        scenario("cut", stage, epoch=2, resume=[str(tmp_path / f"cut-{stage}" / "e000001" / "step-000000010")])
        for stage in (0, 1, 2)
    ]
    assert run_gang(tmp_path / "gang", [*wholes, *firsts, *seconds]) == [0, 0]
    assert wholes[0].task == "norms", "running statistics are those of both ranks, and come back too"
    for whole, first, second in zip(wholes, firsts, seconds, strict=True):
        assert "stopped" in first.kinds() and "exported" not in first.kinds()
        assert second.series() == after(whole, 10)


def test_a_directive_makes_a_checkpoint_and_stops(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), stop_at=5, checkpoint_every=100)
    assert run_scenario(scenario, solo_gang()) is None
    stopped = scenario.events()[-1].stopped
    assert (stopped.reason, stopped.checkpoint_step) == ("CANCELLED", scenario.checkpoints()[-1].step)
    assert 5 <= stopped.checkpoint_step < 30
    assert "finished" not in scenario.kinds()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    scenario = Scenario(str(tmp_path_factory.mktemp("trained")), zero_stage=1, steps=25)
    assert run_scenario(scenario, solo_gang()) is None
    return scenario


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink], ids=["cut", "flipped", "deleted"])
@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "manifest.json"]
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path,
    trained: Scenario,
    name: str,
    harm: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="shardyard")
    folders = [tmp_path / f"step-{step:09}" for step in (20, 10)]
    for folder in folders:
        shutil.copytree(trained.attempt_dir / folder.name, folder)
    harm(folders[0] / name)
    resumed = Scenario(str(tmp_path), zero_stage=1, steps=25, epoch=2, resume=[str(folder) for folder in folders])
    assert run_scenario(resumed, solo_gang()) is None
    (report,) = resumed.checkpoints(CORRUPT)
    assert report.path == str(folders[0]) and report.step == 20 and name in report.message
    assert resumed.series() == after(trained, 10)
    assert resumed.kinds()[-1] == "exported"
    assert f"checkpoint of step 20 is damaged: {folders[0]}: {report.message}" in caplog.messages
    assert f"checkpoint of step 25: {resumed.checkpoints()[-1].path}" in caplog.messages


def test_no_whole_checkpoint_is_a_failure_and_never_a_silent_new_beginning(tmp_path: Path, trained: Scenario) -> None:
    folder = tmp_path / "step-000000020"
    shutil.copytree(trained.attempt_dir / folder.name, folder)
    _flip(folder / "mp_rank_00_model_states.pt")
    resumed = Scenario(str(tmp_path), zero_stage=1, steps=25, epoch=2, resume=[str(folder)])
    failure = run_scenario(resumed, solo_gang())
    assert failure is not None and failure.cause == "CHECKPOINT_CORRUPT"
    assert "mp_rank_00_model_states.pt" in failure.message
    assert not resumed.series()


@pytest.mark.parametrize("point", ["shard.written", "shard.fsynced", "manifest.written"])
def test_a_checkpoint_killed_before_its_commit_does_not_exist(tmp_path: Path, point: str) -> None:
    passes = 2 if point == "manifest.written" else 3  # The second checkpoint, of step 10, has two files.
    scenario = Scenario(str(tmp_path), zero_stage=1, steps=12, die_at=(point, passes))
    assert run_gang(tmp_path / "gang", [scenario]) == [-9]
    assert [checkpoint.step for checkpoint in scenario.checkpoints()] == [2]
    assert read_manifest(scenario.attempt_dir / "step-000000010")[0] is None
    manifest, _ = read_manifest(scenario.attempt_dir / "step-000000002")
    assert manifest is not None and manifest["step"] == 2


def test_a_checkpoint_killed_after_its_rename_is_committed(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), zero_stage=1, steps=12, die_at=("manifest.renamed", 2))
    assert run_gang(tmp_path / "gang", [scenario]) == [-9]
    manifest, _ = read_manifest(scenario.attempt_dir / "step-000000010")
    assert manifest is not None and manifest["step"] == 10


def test_of_the_steps_up_to_a_committed_checkpoint_no_number_is_lost(tmp_path: Path) -> None:
    # No evaluation at step 7: nothing else waits for what was reported before.
    scenario = Scenario(str(tmp_path), steps=12, checkpoint_every=7, die_at=("manifest.renamed", 2), late_s=0.3)
    assert run_gang(tmp_path / "gang", [scenario]) == [-9]
    assert read_manifest(scenario.attempt_dir / "step-000000007")[0] is not None
    assert set(scenario.series()) == set(range(1, 8))


def test_a_manifest_says_what_is_needed_to_judge_and_to_resume(trained: Scenario) -> None:
    folder = trained.attempt_dir / "step-000000020"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"format", "job_uid", "epoch", "step", "world_size", "zero_stage", "created_us", "size_bytes"} < set(
        manifest
    )
    assert {file["path"] for file in manifest["files"]} | {"manifest.json"} == {path.name for path in folder.iterdir()}
    assert manifest["size_bytes"] == sum(file["bytes"] for file in manifest["files"])
    assert manifest["cursor"]["step"] == 20 and manifest["cursor"]["tokens"] > 0
    assert set(manifest["metrics"]) == {"loss", "goodness"} and {"torch", "deepspeed", "transformers"} <= set(
        manifest["versions"]
    )


def test_a_resumed_attempt_only_proves_that_it_can_write(tmp_path: Path, trained: Scenario) -> None:
    resumed = Scenario(
        str(tmp_path), zero_stage=1, steps=25, epoch=2, resume=[str(trained.attempt_dir / "step-000000020")]
    )
    assert run_scenario(resumed, solo_gang()) is None
    assert resumed.kinds()[:2] == ["resumed", "canary"]
    assert [checkpoint.step for checkpoint in resumed.checkpoints()] == [25]
    assert not list(resumed.attempt_dir.glob("probe-*"))


def test_an_attempt_that_continues_from_the_canarys_checkpoint_tries_the_export(
    tmp_path: Path, trained: Scenario
) -> None:
    first = str(trained.attempt_dir / "step-000000002")
    resumed = Scenario(str(tmp_path), zero_stage=1, steps=25, epoch=2, resume=[first], dry_run_fails=True)
    failure = run_scenario(resumed, solo_gang())
    assert failure is not None and failure.cause == "EXPORT_FAILED"
    assert "canary" not in resumed.kinds() and not resumed.series()


def test_an_attempt_that_lost_only_its_export_makes_no_step_again(tmp_path: Path, trained: Scenario) -> None:
    resumed = Scenario(
        str(tmp_path), zero_stage=1, steps=25, epoch=2, resume=[str(trained.attempt_dir / "step-000000025")]
    )
    assert run_scenario(resumed, solo_gang()) is None
    assert not resumed.series() and not resumed.checkpoints()
    assert resumed.kinds()[-3:] == ["finished", "phase", "exported"]
