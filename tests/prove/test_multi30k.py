"""Translation of Multi30k: not worse than a plain transformers loop on the same model, data and budget."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU

import shardyard
from helpers.plain_translator import train_and_write
from helpers.served import Served
from helpers.small_specs import shared_data

TRAIN, HELD_OUT, LENGTH = 12_000, 300, 48
BUDGET = {"epochs": 4, "learning_rate": 2e-3, "global_batch_size": 64, "seed": 1}
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4}
pytestmark = pytest.mark.prove


def lines(name: str, most: int) -> list[str]:
    with gzip.open(shared_data("multi30k") / name, "rt", encoding="utf-8") as file:
        return [line.strip() for line, _ in zip(file, range(most), strict=False)]


def test_multi30k_is_at_most_a_point_behind_a_plain_loop(service: Served, tmp_path: Path) -> None:
    for part, name, most in (("train", "train", TRAIN), ("held", "val", HELD_OUT)):
        (tmp_path / part).mkdir()
        for language in ("en", "de"):
            content = "\n".join(lines(f"{name}.{language}.gz", most)) + "\n"
            (tmp_path / part / f"{name}.{language}").write_text(content, encoding="utf-8")
    sources, targets = lines("val.en.gz", HELD_OUT), lines("val.de.gz", HELD_OUT)
    train = list(zip(lines("train.en.gz", TRAIN), lines("train.de.gz", TRAIN), strict=True))
    with shardyard.Client(service.address) as client:
        spec = shardyard.JobSpec(
            shardyard.Translation(
                source_language="en", target_language="de", max_source_length=LENGTH, max_target_length=LENGTH
            ),
            model=shardyard.Architecture("t5", SHAPE, dropout=0.1),
            tokenizer=shardyard.TrainedTokenizer(vocab_size=4000),
            train_data=shardyard.Data(tmp_path / "train", format="text"),
            eval_data=shardyard.Data(tmp_path / "held", format="text"),
            optimization=shardyard.Optimization(**BUDGET),
            resources=shardyard.Resources(workers=2),
            evaluation=shardyard.EvaluationPolicy(every=10_000),
        )
        job = client.submit(spec, job_id="multi30k")
        assert job.wait(timeout=3000).state == "succeeded"
        model = client.model("multi30k")
        numbers = model.info.metrics
        texts = [answer.text or "" for answer in model.predict(sources)]
        folder = model.download(tmp_path / "model")
    assert BLEU().corpus_score(texts, [targets]).score == pytest.approx(numbers["bleu"], abs=1e-9)
    plain = BLEU().corpus_score(
        train_and_write(folder, train, sources, length=LENGTH, budget=BUDGET), [targets]
    ).score  # fmt: skip
    commonest = Counter(target for _, target in train).most_common(1)[0][0]
    trivial = BLEU().corpus_score([commonest] * len(sources), [targets]).score
    print(
        f"BLEU: ours {numbers['bleu']:.2f}, plain {plain:.2f}, copying {numbers['copied_bleu']:.2f}, one {trivial:.2f}"
    )
    assert numbers["bleu"] >= plain - 1
    assert numbers["bleu"] > 3 * max(trivial, numbers["copied_bleu"])
