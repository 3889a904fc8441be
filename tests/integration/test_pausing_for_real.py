"""A real training is paused from the command line, its service killed, and resumed: nothing of it is different."""

from __future__ import annotations

from pathlib import Path

import shardyard
from helpers.served import served, wait_for_step
from helpers.small_specs import sentences


def a_training(folder: Path) -> shardyard.JobSpec:
    (folder / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    return shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=64),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=folder / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=800, global_batch_size=4),
        checkpoints=shardyard.Checkpoints(every=1000),
        evaluation=shardyard.EvaluationPolicy(every=1000),
    )


def test_a_pause_and_a_killed_service_change_no_loss(tmp_path: Path) -> None:
    spec = a_training(tmp_path)
    with served(tmp_path, "local") as service, shardyard.Client(service.address) as client:
        job = client.submit(spec, job_id="mine")
        wait_for_step(job, 30)
        assert job.pause().state == "pausing"
        asked = service.run("shardyard", "pause", "mine")
        assert asked.stdout.startswith("mine is paus"), asked.stderr
        _until(job, "paused")
        cluster = client.server_info().cluster
        assert cluster is not None and cluster.free_slots == cluster.slots
        paused_at = job.checkpoints()[0].step
        assert 30 <= paused_at < 800
        service.kill()
        service.start()
        assert job.refresh().state == "paused"
        assert "cancel it first" in service.run("shardyard", "delete", "mine").stderr
        assert "mine is queued" in service.run("shardyard", "resume", "mine").stdout
        assert job.wait(timeout=120).state == "succeeded"
        assert [attempt.resumed_from_step for attempt in job.attempts()] == [0, paused_at]
        assert job.info.usage is not None and job.info.usage.recomputed_steps == 0
        undisturbed = client.submit(spec)
        undisturbed.wait(timeout=120)
        assert _losses(job) == _losses(undisturbed)


def _until(job: shardyard.Job, state: str) -> None:
    for event in job.watch(kinds=["state"]):
        if event.state == state:
            return


def _losses(job: shardyard.Job) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in job.metrics("loss")["loss"].points]
