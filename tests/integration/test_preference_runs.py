"""Whole runs of preferences by the trainer: losses of a plain loop with a frozen copy, and a resume bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from helpers.chat_folders import chat_folder
from helpers.preferences import PlainPreference, spec_of, write_preferences
from helpers.trainer_processes import TrainerGang, attempt_in, run_to_the_end
from helpers.trainer_reference import plain_losses
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    chat_folder(folder / "chat")
    write_preferences(folder / "a.jsonl")
    return folder


def attempt_of(
    folder: Path, name: str, *, stage: int = 0, workers: int = 1, rank: int = 0, dropout: float = 0.0, epoch: int = 1
) -> worker_pb2.AttemptSpec:
    spec = spec_of(
        folder / "a.jsonl",
        model={"model": "projects/default/models/chat", "dropout": dropout},
        optimization={"maxSteps": STEPS, "globalBatchSize": 5, "learningRate": 1e-2, "seed": 4},
        evalData={"uri": str(folder / "a.jsonl")},
        parallelism={"zeroStage": stage},
        resources={"workers": workers},
        checkpoints={"every": 4},
        evaluation={"every": 100},
    )
    if rank:
        spec.fine_tuning.lora.rank, spec.fine_tuning.lora.dropout = rank, dropout
    return attempt_in(folder, name, spec, epoch=epoch, **{"projects/default/models/chat": folder / "chat"})


def phases(gang: TrainerGang) -> list[str]:
    return [event.phase.phase for event in gang.events if event.HasField("phase")]


@pytest.mark.parametrize(
    ("stage", "workers", "rank"),
    [(3, 2, 0), *(pytest.param(stage, 2, 4, marks=pytest.mark.prove) for stage in (0, 1, 2, 3))],
)
def test_losses_are_those_of_a_plain_loop_with_a_frozen_copy(folder: Path, stage: int, workers: int, rank: int) -> None:
    attempt = attempt_of(folder, f"{stage}-{workers}-{rank}", stage=stage, workers=workers, rank=rank)
    prepared = prepare(attempt.spec, attempt.locations)
    config = train_config(attempt, num_train_samples=prepared.train.num_samples)
    plain = PlainPreference(build_module(prepared, attempt.spec).model)
    expected, _ = plain_losses(prepared, plain, config)
    gang = run_to_the_end(attempt)
    losses = gang.losses()
    assert list(losses) == list(range(1, STEPS + 1)) and losses[1] == pytest.approx(math.log(2), rel=1e-6)
    assert max(abs(losses[step + 1] / loss - 1) for step, loss in enumerate(expected)) < 1e-5
    batch = prepared.eval.micro_batch([SampleRef(0, at) for at in range(prepared.eval.num_samples)])
    with torch.no_grad():
        loss = float(plain(**batch.inputs).loss_sum) / batch.num_units
    metrics = gang.metrics()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4) and metrics["reward_accuracy"] > 0.9
    assert metrics["reward_margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"], rel=1e-6)


@pytest.mark.parametrize("is_kept", [True, pytest.param(False, marks=pytest.mark.prove)])
def test_a_resumed_run_has_the_losses_of_an_undisturbed_one_bit_for_bit(folder: Path, is_kept: bool) -> None:
    first = attempt_of(folder, f"whole-{is_kept}", dropout=0.2, rank=4)
    whole = run_to_the_end(first)
    assert "reference" in phases(whole)
    kept = Path(first.job_dir) / "before-training.npz"
    if not is_kept:
        kept.write_bytes(kept.read_bytes()[:100])
    again = attempt_of(folder, f"whole-{is_kept}", dropout=0.2, rank=4, epoch=2)
    again.resume_candidates.append(str(Path(first.attempt_dir) / "step-000000004"))
    resumed = run_to_the_end(again)
    assert ("reference" in phases(resumed)) == (not is_kept)
    assert resumed.losses() == {step: loss for step, loss in whole.losses().items() if step > 4}
    assert resumed.metrics() == whole.metrics()


def test_a_stop_ends_the_measuring_of_the_reference_on_all_ranks_together(folder: Path) -> None:
    def stop(request: worker_pb2.ReportRequest) -> worker_pb2.ReportReply:
        if any(event.phase.phase == "reference" for event in request.events):
            reply.directive.action, reply.directive.reason = worker_pb2.Directive.ACTION_CHECKPOINT_AND_STOP, "PAUSED"
        return reply

    reply = worker_pb2.ReportReply()
    attempt = attempt_of(folder, "stopped", stage=3, workers=2)
    gang = TrainerGang(attempt, stop)
    assert gang.wait() == [0, 0], gang.failures()
    last = [event for event in gang.events if event.WhichOneof("payload") != "metrics"][-1]
    assert last.stopped == worker_pb2.Stopped(reason="PAUSED")
    assert phases(gang)[-1] == "reference" and not gang.losses()
    assert not (Path(attempt.job_dir) / "before-training.npz").exists()
