"""A small model that learns from a large one beats the same model that learns from the labels alone: SST-2."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import shardyard
from helpers.served import Served
from helpers.small_specs import shared_data

SEEDS = (1, 2, 3)
pytestmark = pytest.mark.prove


def test_a_bert_tiny_that_a_minilm_teaches_beats_one_that_is_fine_tuned_alone(
    service: Served, bert: Path, bert_tiny: Path
) -> None:
    data = shared_data("sst2")
    columns = {"header": False, "text": "column_1", "label": "column_2"}
    spec = shardyard.JobSpec(
        shardyard.TextClassification(pooling="mean", max_length=64),
        model=bert,
        train_data=shardyard.Data(data / "train.tsv", **columns),
        eval_data=shardyard.Data(data / "test.tsv", **columns),
        optimization=shardyard.Optimization(epochs=2, learning_rate=1e-4, seed=1),
        resources=shardyard.Resources(workers=2),
    )
    with shardyard.Client(service.address) as client:

        def accuracy(spec: shardyard.JobSpec, job_id: str) -> float:
            assert client.submit(spec, job_id=job_id).wait(timeout=3600).state == "succeeded"
            return client.model(job_id).info.metrics["accuracy"]

        teacher = accuracy(spec, "teacher")
        alone, taught = [], []
        for seed in SEEDS:
            optimization = shardyard.Optimization(epochs=6, learning_rate=3e-4, seed=seed)
            small = dataclasses.replace(spec, model=bert_tiny, optimization=optimization)
            alone.append(accuracy(small, f"alone-{seed}"))
            lesson = shardyard.Distillation("model:teacher", weight=0.9, temperature=2)
            taught.append(accuracy(dataclasses.replace(small, distillation=lesson), f"taught-{seed}"))
        print(f"SST-2: teacher {teacher:.3f}; alone {alone}; taught {taught}")
    assert teacher >= 0.885
    assert sum(taught) > sum(alone)
    assert sum(one > other for one, other in zip(taught, alone, strict=True)) >= 2
