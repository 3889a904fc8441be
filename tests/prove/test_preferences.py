"""Preferences on sentences of SST-2, praise before blame: not worse than a plain loop on the same model and pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import shardyard
from helpers.plain_preference import Pair, train_and_compare
from helpers.served import Served
from helpers.small_specs import shared_data

HELD_OUT, LENGTH, SEEDS = 800, 96, (1, 2)
PROMPT = "What do you say about the film?"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
FIRST = {"epochs": 2, "learning_rate": 3e-3, "global_batch_size": 32, "seed": 1}
BUDGET = {"epochs": 3, "learning_rate": 1e-3, "global_batch_size": 32}
pytestmark = pytest.mark.prove


def pairs_of_sentences() -> list[Pair]:
    """Each sentence that praises a film with one that does not, in a fixed order; none is in two pairs."""
    rows = [line.rsplit("\t", 1) for line in (shared_data("sst2") / "train.tsv").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    praise, blame = ([text for text, label in rows if label == wanted] for wanted in "10")
    return [Pair(PROMPT, good, bad) for good, bad in zip(praise, blame, strict=False)]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_preferences_are_at_most_a_point_behind_a_plain_loop(service: Served, tmp_path: Path) -> None:
    pairs = pairs_of_sentences()
    held_out, train = pairs[:HELD_OUT], pairs[HELD_OUT:]
    said = [{"prompt": PROMPT, "completion": text} for pair in train for text in (pair.chosen, pair.rejected)]
    files = {name: write(tmp_path / name, rows) for name, rows in {
        "said.jsonl": said, "train.jsonl": [pair._asdict() for pair in train],
        "held.jsonl": [pair._asdict() for pair in held_out],
    }.items()}  # fmt: skip
    ours, plain = [], []
    with shardyard.Client(service.address) as client:
        first = shardyard.JobSpec(
            shardyard.Instruction(max_length=LENGTH),
            model=shardyard.Architecture("llama", SHAPE),
            tokenizer=shardyard.TrainedTokenizer(vocab_size=2000),
            train_data=files["said.jsonl"],
            optimization=shardyard.Optimization(**FIRST),
            evaluation=shardyard.EvaluationPolicy(holdout=0),
        )
        assert client.submit(first, job_id="film-talk").wait(timeout=1000).state == "succeeded"
        folder = client.model("film-talk").download(tmp_path / "model")
        for seed in SEEDS:
            budget = {**BUDGET, "seed": seed}
            spec = shardyard.JobSpec(
                shardyard.Preference(max_length=LENGTH),
                model=client.model("film-talk"),
                train_data=files["train.jsonl"],
                eval_data=files["held.jsonl"],
                optimization=shardyard.Optimization(**budget),
                resources=shardyard.Resources(workers=2),
                evaluation=shardyard.EvaluationPolicy(every=10_000),
            )
            assert client.submit(spec, job_id=f"praise-{seed}").wait(timeout=1000).state == "succeeded"
            ours.append(client.model(f"praise-{seed}").info.metrics["reward_accuracy"])
            plain.append(train_and_compare(folder, train, held_out, length=LENGTH, budget=budget))
    before = plain[0].before
    print(f"reward accuracy: ours {ours}, plain {[each.after for each in plain]}; before training {before}")
    assert sum(ours) / len(ours) >= sum(each.after for each in plain) / len(plain) - 0.01
    assert min(ours) > max(before, 0.5) + 0.1
