"""Through the service's own door: models that changed after they were looked into are refused, not used in silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import shardyard
from helpers.served import attempts_told, served
from helpers.small_specs import sentences
from helpers.tiny_folders import save_folder

WEIGHTS = "model.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_neither_a_job_that_waited_nor_predict_uses_a_model_that_has_changed(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(200)) + "\n")
    model = save_folder(tmp_path / "models" / "gpt2", "GPT2LMHeadModel")
    long = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=16),
        model=f"server:{model}",
        train_data=tmp_path / "corpus.txt",
        optimization=shardyard.Optimization(max_steps=100_000, global_batch_size=2),
        evaluation=shardyard.EvaluationPolicy(every=100_000),
    )
    with (
        served(tmp_path, "local", "--cpus", "1", "--data-root", str(tmp_path)) as service,
        shardyard.Client(service.address, reconnect_for=5.0) as client,
    ):
        kept = client.upload_model(model)
        (answer,) = kept.predict(["hello"], max_new_tokens=2)
        flip(Path(kept.info.path) / WEIGHTS)
        for ask in (lambda: kept.predict(["hello"]), lambda: kept.embed(["hello"])):
            with pytest.raises(shardyard.FailedPrecondition, match=WEIGHTS) as refused:
                ask()
            assert refused.value.reason == "MODEL_CHANGED"
        with pytest.raises(shardyard.ShardyardError, match=WEIGHTS):
            client.submit(dataclasses.replace(long, model=kept.name))
        flip(Path(kept.info.path) / WEIGHTS)
        assert kept.predict(["hello"], max_new_tokens=2) == [answer]

        first, waits = client.submit(long), client.submit(long)
        flip(model / WEIGHTS)
        first.cancel()
        failure = next(told.failure for told in attempts_told(waits) if told.failure is not None)
        assert failure.reason == "MODEL_CHANGED" and "the model" in failure.message and "submit" in failure.next_step
