"""A disk that fills up under a real job: it is reported at once, and the run continues when there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import shardyard
from helpers.full_disk import fill, small_disk
from helpers.served import served
from helpers.small_specs import sentences

# A checkpoint is written only if 1 GiB stays free.
MEGABYTES = 1024 + 96


def follow(job: shardyard.Job, until: Callable[[shardyard.types.Event], bool]) -> Iterator[shardyard.types.Event]:
    for event in job.watch():
        yield event
        if until(event):
            return


def condition(event: shardyard.types.Event) -> bool | None:
    """Whether disk pressure began; None for an event of another kind."""
    found = event.data
    is_one = isinstance(found, shardyard.types.Condition) and found.type == "disk_pressure"
    return found.active if is_one else None


def small_job(tmp_path: Path, *, every: int) -> shardyard.JobSpec:
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    return shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=32),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=tmp_path / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=100_000, global_batch_size=2),
        checkpoints=shardyard.Checkpoints(every=every),
        evaluation=shardyard.EvaluationPolicy(every=100_000),
    )


def test_a_full_disk_is_reported_at_once_and_the_run_continues_when_there_is_room(tmp_path: Path) -> None:
    spec = small_job(tmp_path, every=100_000)
    with (
        small_disk(tmp_path / "disk", MEGABYTES) as disk,
        served(tmp_path, "local", "--storage-root", str(disk / "storage")) as service,
        shardyard.Client(service.address) as client,
    ):
        job = client.submit(spec)
        # Its trial export comes after the first checkpoint: without room for that the attempt would rightly fail.
        list(follow(job, lambda event: isinstance(event.data, shardyard.types.CanaryPassed)))
        filler = fill(disk)
        *_, began = follow(job, lambda event: condition(event) is True)
        assert "space" in began.data.message or "free" in began.data.message
        job.refresh()
        assert job.state in ("preparing", "running")
        filler.unlink()
        seen = list(follow(job, lambda event: condition(event) is False))
        assert [condition(event) for event in seen if condition(event) is not None] == [True, False]
        step = max(event.progress.step for event in seen if event.progress is not None)
        list(follow(job, lambda event: event.progress is not None and event.progress.step > step + 50))
        failures = [attempt.failure for attempt in job.attempts()]
        assert failures == [None], failures
        job.cancel()
        assert job.wait(timeout=60, check=False).state == "cancelled"


def test_a_disk_that_is_filled_after_a_skipped_checkpoint_fails_the_attempt_for_that(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", MEGABYTES) as disk,
        served(tmp_path, "local", "--storage-root", str(disk / "storage")) as service,
        shardyard.Client(service.address) as client,
    ):
        job = client.submit(small_job(tmp_path, every=500))
        list(follow(job, lambda event: isinstance(event.data, shardyard.types.CheckpointChanged)))
        half = disk / "half"
        half.write_bytes(bytes(200 << 20))
        began = next(event for event in follow(job, lambda event: False) if condition(event) is True)
        assert "was skipped" in began.data.message and str(disk) not in began.data.message
        fill(disk)
        # Its third checkpoint in a row: the rank that says so is heard, though nothing that it said has room.
        failed = next(
            event.data.attempt
            for event in follow(job, lambda event: False)
            if isinstance(event.data, shardyard.types.AttemptChanged) and event.data.attempt.failure is not None
        )
        assert failed.failure.reason == "STORAGE_FULL" and "a checkpoint and its reserve need" in failed.failure.message
        # Fewer checkpoints would not make room: all of this job's take a few MB.
        assert "keep_last" not in failed.failure.next_step and "delete jobs" in failed.failure.next_step
        job.cancel()
        assert job.wait(timeout=60, check=False).state == "cancelled"
