"""A service without Ray that is stopped in order and started again: its jobs continue, and none has failed for it."""

from __future__ import annotations

import signal
from pathlib import Path

import shardyard
from helpers.served import served
from helpers.small_specs import sentences


def test_a_service_that_is_stopped_in_order_costs_no_retry(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(300)) + "\n")
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=64),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=tmp_path / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=100_000, global_batch_size=4),
        checkpoints=shardyard.Checkpoints(every=20),
        evaluation=shardyard.EvaluationPolicy(every=100_000),
        retry=shardyard.Retry(max=0),
    )
    with served(tmp_path, "local") as service, shardyard.Client(service.address) as client:
        job = client.submit(spec)
        for event in job.watch(kinds=["checkpoint"]):
            if isinstance(event.data, shardyard.types.CheckpointChanged) and event.data.step >= 20:
                break
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        service.start()
        for event in job.watch(kinds=["checkpoint", "state"]):
            # An older one may be deleted before the second attempt has said where it continues.
            is_checkpoint = isinstance(event.data, shardyard.types.CheckpointChanged)
            if is_checkpoint and event.attempt == 2 and event.data.change == "committed":
                break
        first, second = job.attempts()
        assert first.failure is not None and first.failure.reason == "DRAINED"
        assert second.resumed_from_step >= 20
        job.cancel()
        assert job.wait(timeout=60, check=False).state == "cancelled"
