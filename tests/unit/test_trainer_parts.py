"""Schedule, settings, causes and the watch over learning: the trainer's pure parts."""

from __future__ import annotations

import copy
import errno
import json
import random

import pytest
import torch
from safetensors import SafetensorError

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import DataError, SpecError
from shardyard_trainer.failures import RunFailed, failure_report
from shardyard_trainer.planning.deepspeed_config import deepspeed_config
from shardyard_trainer.training.config import train_config
from shardyard_trainer.training.learning import LearningWatch
from shardyard_trainer.training.schedule import Schedule


def rates(kind: str, *, warmup: int = 4, total: int = 12, minimum: float = 0.0) -> list[float]:
    schedule = Schedule(kind, 1.0, minimum, warmup, total)
    return [schedule.learning_rate(step) for step in range(total)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_no_step_is_wasted(kind: str) -> None:
    values = rates(kind)
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert min(values) > 0
    assert values[4:] == sorted(values[4:], reverse=True)


def test_decays_end_near_the_minimum() -> None:
    assert rates("linear", minimum=0.2)[-1] == pytest.approx(0.2 + 0.8 / 8)
    assert rates("cosine", minimum=0.2)[-1] == pytest.approx(0.2 + 0.8 * 0.0381, abs=1e-3)
    assert rates("constant")[-1] == 1.0
    assert rates("linear", warmup=0, total=1) == [1.0]
    assert rates("linear", warmup=12) == pytest.approx([(step + 1) / 12 for step in range(12)])


def attempt(**optimization: object) -> worker_pb2.AttemptSpec:
    spec = worker_pb2.AttemptSpec(world_size=2)
    spec.spec.optimization.CopyFrom(spec_pb2.Optimization(**optimization))  # type: ignore[arg-type]
    return spec


def test_epochs_become_steps_that_see_every_sample() -> None:
    config = train_config(attempt(epochs=2, global_batch_size=32), num_train_samples=6920)
    assert config.total_steps == 433 and config.evaluate_every == 217
    assert config.schedule.warmup_steps == 44 and config.micro_batch_size == 16


def test_documented_defaults_are_used_if_nothing_was_given() -> None:
    config = train_config(attempt(max_steps=10), num_train_samples=1000)
    assert (config.batch_size, config.clip, config.betas, config.weight_decay) == (32, 1.0, (0.9, 0.999), 0.01)
    assert (config.zero_stage, config.precision, config.evaluate_every, config.log_interval_s) == (1, "fp32", 1, 1.0)


def test_a_run_without_a_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        train_config(attempt(), num_train_samples=10)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_deepspeed_config_keeps_the_engine_contract(stage: int) -> None:
    config = deepspeed_config(zero_stage=stage, clip=1.0, precision="fp32", micro_batch_size=4, workers=2, on_gpu=False)
    assert config["managed_gradient_accumulation"] is False and config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == (0.0 if stage == 0 else 1.0)
    assert config["zero_optimization"].get("overlap_comm", False) is False
    assert json.loads(json.dumps(config)) == config


def test_stage_0_with_bf16_is_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage 1"):
        deepspeed_config(zero_stage=0, clip=1.0, precision="bf16", micro_batch_size=4, workers=1, on_gpu=True)


CAUSES = [
    (DataError("no integer", file="train.csv", line=7, column="label", value="x"), "DATA_ERROR"),
    (SpecError("spec.model", "SPEC_INVALID", "no such model"), "USER_CONFIG"),
    (ValueError("max_steps is required"), "USER_CONFIG"),
    (OSError(errno.ENOSPC, "No space left on device", "/s/x"), "STORAGE_FULL"),
    (OSError(errno.EROFS, "Read-only file system", "/s/x"), "STORAGE_NOT_WRITABLE"),
    (PermissionError(errno.EACCES, "Permission denied", "/s/x"), "STORAGE_NOT_WRITABLE"),
    (OSError(errno.EIO, "Input/output error", "/s/x"), "STORAGE_UNAVAILABLE"),
    (OSError(errno.ESTALE, "Stale file handle", "/s/x"), "STORAGE_UNAVAILABLE"),
    (OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/s/x"), "STORAGE_UNAVAILABLE"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/s/x"), "STORAGE_FULL"),
    (SafetensorError("I/O error: Read-only file system (os error 30)"), "STORAGE_NOT_WRITABLE"),
    (Exception("No space left on device (os error 28)"), "STORAGE_FULL"),
    (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), "HOST_OOM"),
    (ValueError("a label reads (os error 28) here"), "USER_CONFIG"),
    (MemoryError(), "HOST_OOM"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "HOST_OOM"),
    (torch.OutOfMemoryError("CUDA out of memory"), "CUDA_OOM"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "WORKER_LOST"),
    (RunFailed("LOSS_DIVERGED", "not finite", "lower the rate"), "LOSS_DIVERGED"),
    (KeyError("surprise"), "UNKNOWN"),
]


@pytest.mark.parametrize(("error", "cause"), CAUSES, ids=[cause for _, cause in CAUSES])
def test_every_failure_has_a_cause_a_message_and_a_next_step(error: Exception, cause: str) -> None:
    report = failure_report(error, attempt=3, rank=1, step=9, phase="training")
    assert (report.reason, report.attempt, report.rank, report.step) == (cause, 3, 1, 9)
    assert report.message and report.next_step and type(error).__name__ in report.log_tail


def test_bad_data_is_named_with_its_place() -> None:
    report = failure_report(CAUSES[0][0], attempt=1, rank=0, step=None, phase="tokenizing")
    assert dict(report.metadata) == {"file": "train.csv", "line": "7", "column": "label", "value": "x"}
    assert not report.HasField("step")


def test_a_surprise_while_exporting_is_a_failed_export() -> None:
    assert failure_report(KeyError("x"), attempt=1, rank=0, step=9, phase="exporting").reason == "EXPORT_FAILED"


def test_a_disk_that_fails_while_exporting_is_the_storages_failure_whichever_library_says_so() -> None:
    report = failure_report(
        SafetensorError("Read-only file system (os error 30)"), attempt=1, rank=0, step=9, phase="exporting"
    )
    assert report.reason == "STORAGE_NOT_WRITABLE"
    assert report.message == "a file could not be written: Read-only file system"


def test_a_failure_crosses_ranks_whole() -> None:
    # Taken apart and put together again, as between processes.
    failure = copy.deepcopy(RunFailed("STORAGE_FULL", "full", "free space", {"path": "/s"}))
    assert (failure.cause, failure.message, failure.metadata) == ("STORAGE_FULL", "full", {"path": "/s"})


def verdicts(losses: list[float], labels: torch.Tensor | None = None) -> list[str]:
    watch = LearningWatch(total_steps=len(losses), warmup_steps=4, state={})
    if labels is not None:
        watch.see_labels({"labels": labels})
    found = []
    for step, loss in enumerate(losses, 1):
        watch = LearningWatch(total_steps=len(losses), warmup_steps=4, state=json.loads(json.dumps(watch.state_dict())))
        if (verdict := watch.see_loss(step, loss)) is not None:
            found.append(verdict)
    return found


def test_a_run_that_learns_is_left_alone() -> None:
    assert verdicts([4.0 / (1 + step / 10) for step in range(200)]) == []


def test_a_loss_that_never_falls_is_reported_once() -> None:
    (verdict,) = verdicts([4.0] * 200)
    assert "was 4 at its start" in verdict


def test_a_loss_at_the_level_of_label_frequencies_is_said_once() -> None:
    labels = torch.tensor([0, 1] * 500 + [-100] * 10)
    (verdict,) = verdicts([0.80] * 10 + [0.692] * 190, labels)
    assert "label frequencies alone give 0.69" in verdict
    assert verdicts([0.80] * 10 + [0.40] * 190, labels) == []


def first_said(losses: list[float], labels: torch.Tensor | None = None) -> tuple[int, str]:
    watch = LearningWatch(total_steps=len(losses), warmup_steps=len(losses) // 10, state={})
    if labels is not None:
        watch.see_labels({"labels": labels})
    for step, loss in enumerate(losses, 1):
        if (verdict := watch.see_loss(step, loss)) is not None:
            return step, verdict
    return 0, ""


def test_a_loss_that_rises_is_said_within_the_first_tenth() -> None:
    draw = random.Random(4)
    rising = [2.0 + step / 300 + draw.gauss(0, 0.05) for step in range(1000)]
    step, verdict = first_said(rising)
    assert step == 100
    assert "the loss rises: it is 2.2" in verdict and "was 2" in verdict


def test_a_loss_at_the_level_of_frequencies_that_no_longer_falls_is_said_within_the_first_tenth() -> None:
    labels = torch.tensor([0, 1] * 500)
    draw = random.Random(5)
    step, verdict = first_said([0.75] * 10 + [0.693 + draw.gauss(0, 0.001) for _ in range(990)], labels)
    assert step == 100 and "after a tenth of the run; label frequencies alone give 0.69" in verdict
    # Still falling, it may yet learn; it does, or is told of at its half.
    slow = [max(0.75 - step / 2500, 0.4) for step in range(1000)]
    assert first_said(slow, labels) == (0, "")
    stuck = [max(0.75 - step / 2500, 0.69) for step in range(1000)]
    assert first_said(stuck, labels)[0] == 500


def test_answers_that_are_all_alike_are_said_once_unless_the_loss_shows_that_something_is_learnt() -> None:
    labels = torch.tensor([0] * 900 + [1] * 100)
    watch = LearningWatch(total_steps=1000, warmup_steps=100, state={})
    watch.see_labels({"labels": labels})
    assert watch.early == 100
    # Nine in ten are alike in truth: such answers may be right.
    assert watch.see_answers("mcc is 0", 0.25, 64) is None
    verdict = watch.see_answers("mcc is 0", 0.33, 64)
    assert verdict is not None and "answers 64 samples" in verdict and "frequencies alone give 0.325" in verdict
    assert watch.see_answers("mcc is 0", 0.33, 64) is None


def test_noise_of_small_batches_is_not_a_rising_loss() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        losses = [0.7 - step / 2000 + draw.gauss(0, 0.15) for step in range(1000)]
        assert first_said(losses) == (0, ""), seed


def test_a_run_of_an_earlier_version_that_was_judged_is_not_judged_again() -> None:
    watch = LearningWatch(total_steps=200, warmup_steps=4, state={"first": [4.0] * 8, "recent": [4.0], "judged": True})
    assert [verdict for step in range(100, 200) if (verdict := watch.see_loss(step, 9.0))] == []


def test_a_run_too_short_to_judge_is_not_judged() -> None:
    assert verdicts([4.0] * 20) == []
