"""A checkpoint that was damaged on disk: the job says so, continues from the one before, and ends as if undisturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardyard
from helpers.served import Served, rank_pids, served
from helpers.small_specs import sentences

STEPS = 120


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("damaged"), "local") as service:
        (service.folder / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
        yield service


def submit(client: shardyard.Client, service: Served, job_id: str) -> shardyard.Job:
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=64),
        model=shardyard.Architecture("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 64}, dropout=0.1),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=service.folder / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=STEPS, global_batch_size=8, learning_rate=1e-3),
        checkpoints=shardyard.Checkpoints(every=20),
        evaluation=shardyard.EvaluationPolicy(every=60),
    )
    return client.submit(spec, job_id=job_id)


def losses(job: shardyard.Job) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in job.metrics("loss", max_points=STEPS)["loss"].points]


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", pytest.param("manifest.json", marks=pytest.mark.prove)])
def test_a_truncated_file_of_the_newest_checkpoint_costs_only_that_checkpoint(service: Served, file: str) -> None:
    with shardyard.Client(service.address) as client:
        job = submit(client, service, f"truncated-{'manifest' if file.endswith('json') else 'shard'}")
        for event in job.watch(kinds=["checkpoint"]):
            if isinstance(event.data, shardyard.types.CheckpointChanged) and event.data.step >= 60:
                break
        rank = rank_pids(service.state, job.uid)[0]
        os.kill(rank, signal.SIGSTOP)
        newest = max(Path(service.state, "storage", "jobs", job.uid, "e000001").glob("step-*/manifest.json")).parent
        with (newest / file).open("r+b") as damaged:
            damaged.truncate(100)
        os.kill(rank, signal.SIGKILL)
        assert job.wait(timeout=240).state == "succeeded"
        corrupt = [
            event.data
            for event in job.watch(kinds=["checkpoint"])
            if isinstance(event.data, shardyard.types.CheckpointChanged) and event.data.change == "corrupt"
        ]
        assert [(each.step, file in each.message) for each in corrupt] == [(int(newest.name[5:]), True)]
        assert 0 < job.attempts()[1].resumed_from_step < int(newest.name[5:])
        undisturbed = submit(client, service, f"{job.id}-not")
        assert undisturbed.wait(timeout=240).state == "succeeded"
        assert losses(job) == losses(undisturbed)
