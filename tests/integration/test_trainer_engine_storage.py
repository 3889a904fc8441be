"""A full or read-only storage: checkpoints are skipped and said, and in the end it is a failure with a cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.trainer_run import Scenario, run_gang, run_scenario, solo_gang
from shardyard.v1 import job_pb2
from shardyard_trainer.training.checkpoint import kept_bytes, room_step
from shardyard_trainer.training.shards import ShardWriter


def pressure(scenario: Scenario) -> list[bool]:
    found = [event.condition for event in scenario.events() if event.HasField("condition")]
    assert {condition.type for condition in found} <= {job_pb2.Condition.TYPE_DISK_PRESSURE}
    return [condition.active for condition in found]


def test_a_full_disk_under_one_rank_skips_the_checkpoint_on_all_and_training_continues(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path / "run"), zero_stage=1, world_size=2, full_at=("shard.written", [2], 1))
    assert run_gang(tmp_path / "gang", [scenario]) == [0, 0]
    assert [checkpoint.step for checkpoint in scenario.checkpoints()] == [2, 20, 30]
    assert not (scenario.attempt_dir / "step-000000010").exists()
    assert pressure(scenario) == [True, False]
    assert len(scenario.series()) == 30 and scenario.kinds()[-1] == "exported"


def test_a_disk_that_is_full_three_times_in_a_row_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), checkpoint_every=4, full_at=("shard.written", [2, 3, 4], 0))
    failure = run_scenario(scenario, solo_gang())
    assert (
        failure is not None
        and failure.cause == "STORAGE_FULL"
        and failure.metadata["path"] == str(scenario.attempt_dir)
    )
    assert [checkpoint.step for checkpoint in scenario.checkpoints()] == [2]
    assert max(scenario.series()) == 12


def test_a_disk_that_is_full_at_the_start_is_found_by_the_canary(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), full_at=("manifest.written", [1], 0))
    failure = run_scenario(scenario, solo_gang())
    assert failure is not None and failure.cause == "STORAGE_FULL"
    assert not scenario.checkpoints() and "canary" not in scenario.kinds()
    assert not (scenario.attempt_dir / "step-000000002").exists()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_nothing_is_written_for_a_checkpoint_but_what_its_manifest_names(tmp_path: Path, zero_stage: int) -> None:
    scenario = Scenario(str(tmp_path), zero_stage=zero_stage, steps=4, checkpoint_every=4)
    assert run_scenario(scenario, solo_gang()) is None
    steps = {path.name for path in scenario.attempt_dir.iterdir()} - {"events"}
    assert steps == {"step-000000002", "step-000000004"}
    for step in (2, 4):
        folder = scenario.attempt_dir / f"step-{step:09}"
        named = {file["path"] for file in json.loads((folder / "manifest.json").read_text())["files"]}
        assert {path.name for path in folder.iterdir()} == named | {"manifest.json"}
        assert len(named) == (1 if zero_stage == 0 else 2), "the model's states, and the optimizer's"


def test_torchs_word_for_a_full_disk_is_understood() -> None:
    writer = ShardWriter(lambda name: None)
    writer.write({"weights": list(range(1_000_000))}, Path("/dev/full"))
    assert writer.error is not None and writer.error.errno == 28 and not writer.files


def test_an_attempt_whose_folder_cannot_be_made_says_so(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    scenario.attempt_dir.mkdir()
    (scenario.attempt_dir / "step-000000002").write_text("a file where a folder should be")
    failure = run_scenario(scenario, solo_gang())
    assert failure is not None and failure.cause == "STORAGE_NOT_WRITABLE"


def test_fewer_checkpoints_are_advised_only_if_they_would_make_room(tmp_path: Path) -> None:
    for attempt, step in ((1, 2), (1, 10), (2, 20)):
        folder = tmp_path / f"e{attempt:06}" / f"step-{step:09}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        (folder / "shard.pt").write_bytes(bytes(1000))
    (tmp_path / "e000002" / "step-000000030").mkdir()  # Half written, so it is not kept.
    kept = kept_bytes(tmp_path)
    assert kept == [1000, 1000, 1000]
    assert "keep_last (this job has 3 there)" in room_step(2000, kept)
    assert "keep_last" not in room_step(2001, kept)
    assert "keep_last" not in room_step(1, kept[:1]) and "keep_last" not in room_step(1, [])
