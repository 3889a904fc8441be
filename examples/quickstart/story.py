"""The jobs of the quickstart, each submitted through the SDK and followed to its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from material import Material

import shardyard
from shardyard.spec_sources import Architecture
from shardyard.specs import (
    CausalLm,
    Data,
    EvaluationPolicy,
    JobSpec,
    Optimization,
    Parallelism,
    Resources,
    TextClassification,
    TrainedTokenizer,
)

WORKERS = 2
SMALL_GPT2 = Architecture("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 64}, dropout=0.0)
SEED = 0


@dataclass(frozen=True)
class Outcome:
    """What a job left, for the table."""

    job: str
    model: str
    metrics: Mapping[str, float]
    took: timedelta
    peak_memory_bytes: int


def pretraining(text: Path, *, steps: int, vocab_size: int) -> JobSpec:
    """A small GPT-2 from scratch, with a tokenizer trained on the same text."""
    return JobSpec(
        CausalLm(sequence_length=64),
        model=SMALL_GPT2,
        tokenizer=TrainedTokenizer("byte_bpe", vocab_size=vocab_size),
        train_data=Data(text, format="text"),
        evaluation=EvaluationPolicy(holdout=0.01, every=steps // 2),
        optimization=Optimization(
            max_steps=steps, global_batch_size=32, learning_rate=4e-3, warmup_steps=50, seed=SEED
        ),
        parallelism=Parallelism(zero_stage=2),
        resources=Resources(workers=WORKERS),
    )


def fine_tuning(
    model: str | Path | Architecture,
    material: Material,
    *,
    epochs: float,
    learning_rate: float,
    tokenizer: str | Path | None = None,
) -> JobSpec:
    """A classifier of the material's texts, evaluated on its held-out test set."""
    return JobSpec(
        TextClassification(pooling="mean", max_length=64),
        model=model,
        tokenizer=tokenizer,
        train_data=Data(material.few, text="text", label="label"),
        eval_data=Data(material.test, text="text", label="label"),
        optimization=Optimization(epochs=epochs, global_batch_size=32, learning_rate=learning_rate, seed=SEED),
        parallelism=Parallelism(zero_stage=2),
        resources=Resources(workers=WORKERS),
    )


def bert_without_its_pretraining(bert: Path) -> Architecture:
    """The architecture of a folder, its weights left out."""
    config = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    return Architecture("bert", {name: config[name] for name in names})


def run_job(client: shardyard.Client, spec: JobSpec, job_id: str) -> Outcome:
    """Submit, follow and print, to the end. Raises shardyard.JobFailed and every other error of the SDK."""
    job = client.submit(spec, job_id=job_id)
    print(f"  {job.name} accepted", flush=True)
    peak, shown = 0, -1
    for event in job.watch(min_interval=0.5):
        progress = event.progress
        if progress is None:
            print(f"  {event}", flush=True)
            continue
        peak = max(peak, progress.peak_memory_bytes)
        tenth = 10 * progress.step // max(progress.total_steps, 1)
        if tenth > shown:
            shown = tenth
            print(f"  {event}", flush=True)
    info = job.wait(60)
    created, ended = info.create_time, info.end_time
    return Outcome(
        job=info.name,
        model=info.model,
        metrics=info.evaluation.metrics if info.evaluation else {},
        took=ended - created if created and ended else timedelta(),
        peak_memory_bytes=peak,
    )
