"""The engine trains the right thing: losses of a plain PyTorch loop, for every ZeRO stage, on one rank and on two."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from helpers.trainer_reference import mean_of_means_losses, reference_losses
from helpers.trainer_run import Scenario, run_gang, run_scenario, solo_gang
from helpers.trainer_tasks import TinyTask
from shardyard_trainer.training.config import TrainConfig, train_config

STAGES = (0, 1, 2, 3)
TASKS = ("gpt2", "bert", "tags", "pictures", "lora", "taught", "again")
STEPS = {"gpt2": 30, "bert": 30, "tags": 12, "pictures": 12, "lora": 12, "taught": 12, "again": 12}
"""What the engine could get wrong, clipping and warm-up included, shows within a few steps; two tasks take more."""


def config_of(scenario: Scenario) -> TrainConfig:
    return train_config(scenario.spec(), num_train_samples=TinyTask(scenario.task).train.num_samples)


def worst(losses: dict[int, float], expected: list[float]) -> float:
    assert list(losses) == list(range(1, len(expected) + 1))
    return max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("zero_stage", STAGES)
def test_one_rank_has_the_losses_of_plain_pytorch(tmp_path: Path, task: str, zero_stage: int) -> None:
    scenario = Scenario(str(tmp_path), task=task, zero_stage=zero_stage, steps=STEPS[task])
    assert run_scenario(scenario, solo_gang()) is None
    losses, norms = reference_losses(TinyTask(task), config_of(scenario))
    assert worst(scenario.series("loss"), losses) < 1e-5
    assert worst(scenario.series("grad_norm"), norms) < 1e-5
    assert max(norms) > 1, "clipping had something to do"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Scenario]:
    """Each task at every stage on two ranks, in one gang of processes."""
    folder = tmp_path_factory.mktemp("two-ranks")
    scenarios = {
        (task, stage): Scenario(
            str(folder / f"{task}-{stage}"),
            task=task,
            zero_stage=stage,
            world_size=2,
            micro_batch_size=3,
            steps=STEPS[task],
        )
        for task in TASKS
        for stage in STAGES
    }
    # A batch of 3 in micro batches of 1: one rank makes two backward calls with one sample.
    scenarios |= {
        ("dummy", stage): Scenario(
            str(folder / f"dummy-{stage}"), zero_stage=stage, world_size=2, batch_size=3, micro_batch_size=1
        )
        for stage in (2, 3)
    }
    scenarios |= {
        ("offload", stage): Scenario(
            str(folder / f"offload-{stage}"),
            task="tags",
            zero_stage=stage,
            world_size=2,
            micro_batch_size=3,
            steps=STEPS["tags"],
            offload=True,
        )
        for stage in (1, 2, 3)
    }
    codes = run_gang(folder, list(scenarios.values()))
    assert codes == [0, 0], (folder / "rank-0.log").read_text()[-3000:]
    return scenarios


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_with_unequal_tokens_have_the_losses_of_plain_pytorch(
    two_ranks: dict[tuple[str, int], Scenario], task: str, zero_stage: int
) -> None:
    scenario = two_ranks[task, zero_stage]
    losses, norms = reference_losses(TinyTask(task), config_of(scenario))
    assert worst(scenario.series("loss"), losses) < 1e-5
    assert worst(scenario.series("grad_norm"), norms) < 1e-5


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_rank_short_of_samples_calls_backward_as_often_and_changes_nothing(
    two_ranks: dict[tuple[str, int], Scenario], zero_stage: int
) -> None:
    scenario = two_ranks["dummy", zero_stage]
    losses, norms = reference_losses(TinyTask("gpt2"), config_of(scenario))
    assert worst(scenario.series("loss"), losses) < 1e-5
    assert worst(scenario.series("grad_norm"), norms) < 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_optimizer_in_the_memory_of_the_node_changes_no_loss(
    two_ranks: dict[tuple[str, int], Scenario], zero_stage: int
) -> None:
    scenario = two_ranks["offload", zero_stage]
    losses, norms = reference_losses(TinyTask("tags"), config_of(scenario))
    assert worst(scenario.series("loss"), losses) < 1e-5
    assert worst(scenario.series("grad_norm"), norms) < 1e-5


def test_the_exported_weights_are_whole_at_every_stage(two_ranks: dict[tuple[str, int], Scenario]) -> None:
    weights = [torch.load(Path(two_ranks["gpt2", stage].folder) / "model" / "weights.pt") for stage in STAGES]
    module = TinyTask("gpt2").module()
    for state in weights:
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in module.state_dict().items()
        }
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, weights[0][name], rtol=0, atol=1e-4)


def test_the_mean_of_micro_batch_means_trains_something_else(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), task="gpt2", micro_batch_size=2)
    config = config_of(scenario)
    right, _ = reference_losses(TinyTask("gpt2"), config)
    wrong = mean_of_means_losses(TinyTask("gpt2"), config)
    assert max(abs(a / b - 1) for a, b in zip(wrong, right, strict=True)) > 1e-4


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, zero_stage: int) -> None:
    calm = Scenario(str(tmp_path / "calm"), zero_stage=zero_stage, steps=12, learning_rate=0.0)
    poisoned = Scenario(str(tmp_path / "poisoned"), zero_stage=zero_stage, steps=12, learning_rate=0.0, poison=[4, 5])
    for scenario in (calm, poisoned):
        assert run_scenario(scenario, solo_gang()) is None
    losses = poisoned.series("loss")
    assert losses == {step: loss for step, loss in calm.series("loss").items() if step not in (5, 6)}
    assert [e.warning.reason for e in poisoned.events() if e.HasField("warning")] == ["STEP_LEFT_OUT"] * 2
    weights = [torch.load(Path(scenario.folder) / "model" / "weights.pt") for scenario in (calm, poisoned)]
    assert all(torch.isfinite(tensor).all() for tensor in weights[1].values())


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_three_steps_in_a_row_that_are_not_finite_are_the_end(tmp_path: Path, zero_stage: int) -> None:
    scenario = Scenario(str(tmp_path), zero_stage=zero_stage, steps=12, poison=[4, 5, 6])
    failure = run_scenario(scenario, solo_gang())
    assert failure is not None and failure.cause == "LOSS_DIVERGED"
    assert max(scenario.series("learning_rate")) == 7
    assert "lower optimization.learning_rate" in failure.next_step


def test_a_run_whose_every_step_was_skipped_is_not_a_success(tmp_path: Path) -> None:
    scenario = Scenario(str(tmp_path), steps=2, poison=[0, 1])
    failure = run_scenario(scenario, solo_gang())
    assert failure is not None and failure.cause == "LOSS_DIVERGED"
    assert "exported" not in scenario.kinds()


def test_events_come_in_the_order_that_the_coordinator_expects(two_ranks: dict[tuple[str, int], Scenario]) -> None:
    told = [kind for kind in two_ranks["bert", 1].kinds() if kind not in ("phase", "metrics")]
    # Progress comes as often as time passes, so a slow machine has more of it.
    kinds = [kind for kind, _ in itertools.groupby(told)]
    assert kinds[:5] == ["resumed", "progress", "evaluation", "checkpoint", "canary"]
    assert kinds[-4:] == ["evaluation", "checkpoint", "finished", "exported"]


def test_every_step_has_its_numbers_and_progress_covers_all_of_them(two_ranks: dict[tuple[str, int], Scenario]) -> None:
    scenario = two_ranks["gpt2", 2]
    for metric in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "loader_wait_s"):
        assert list(scenario.series(metric)) == list(range(1, 31))
    last = [event.progress for event in scenario.events() if event.HasField("progress")][-1]
    lengths = TinyTask("gpt2").train.lengths()
    assert (last.step, last.total_steps) == (30, 30)
    assert last.data_epoch == pytest.approx(3.6)
    assert last.tokens > 3 * lengths.sum()
    assert 0 < last.padding_share < 0.3 and last.peak_memory_bytes > 1e8 and math.isfinite(last.tokens_per_s)
