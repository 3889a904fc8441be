"""Questions of XQuAD: not worse than a plain transformers loop on the same model, data and budget."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

import shardyard
from helpers.plain_answers import Row, rows_of, scores, train_and_answer
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EPOCHS, LEARNING_RATE, BATCH, LENGTH, OVERLAP, ARTICLES, SEEDS = 3, 2e-4, 16, 320, 128, 38, (1, 2)
EXAMPLE = Path(__file__).parents[2] / "examples" / "question-answering.yaml"
pytestmark = pytest.mark.prove


def random_spans(rows: list[Row], seed: int) -> list[str]:
    """As many words as an answer has in the median, from anywhere in the context."""
    draw = random.Random(seed)
    length = round(statistics.median(len(row["answers"][0]["text"].split()) for row in rows))
    found = []
    for row in rows:
        words = row["context"].split()
        first = draw.randrange(max(len(words) - length, 1))
        found.append(" ".join(words[first : first + length]))
    return found


def test_xquad_is_at_most_a_point_behind_a_plain_loop(service: Served, bert: Path, tmp_path: Path) -> None:
    articles = json.loads((shared_data("xquad") / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    files = []
    for name, part in (("--train", articles[:ARTICLES]), ("--eval", articles[ARTICLES:])):
        path = tmp_path / f"{name.strip('-')}.json"
        path.write_text(json.dumps({"version": "1.1", "data": part}))
        files += [name, str(path)]
    train, held_out = rows_of(articles[:ARTICLES]), rows_of(articles[ARTICLES:])
    settings = {"optimization.epochs": EPOCHS, "optimization.learning_rate": LEARNING_RATE}
    settings |= {"optimization.global_batch_size": BATCH, "fine_tuning.question_answering.max_length": LENGTH}
    ours, plain = [], []
    for seed in SEEDS:
        given = [*(f"spec.{name}={value}" for name, value in settings.items()), f"spec.optimization.seed={seed}"]
        flags = [part for each in [*given, f"job_id=xquad-{seed}"] for part in ("--set", each)]
        done = service.run(
            str(BIN / "shardyard"), "submit", str(EXAMPLE), "--model", str(bert), *files, *flags, timeout_s=3000
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        with shardyard.Client(service.address) as client:
            model = client.model(f"xquad-{seed}")
            answers = model.predict([shardyard.Question(row["question"], row["context"]) for row in held_out])
            numbers = model.info.metrics
        # The job's own numbers, by SQuAD's script and by the model that answers.
        found = scores([answer.answer.text if answer.answer else "" for answer in answers], held_out)
        assert found == pytest.approx((numbers["exact_match"], numbers["f1"]), abs=1e-9)
        ours.append(numbers["f1"])
        texts = train_and_answer(
            bert, train, held_out, epochs=EPOCHS, learning_rate=LEARNING_RATE, batch=BATCH,
            length=LENGTH, overlap=OVERLAP, seed=seed,
        )  # fmt: skip
        plain.append(scores(texts, held_out)[1])
        print(f"seed {seed}: ours {found}, plain transformers {scores(texts, held_out)}", flush=True)
    trivial = statistics.mean(scores(random_spans(held_out, seed), held_out)[1] for seed in range(20))
    print(f"F1: ours {ours}, plain transformers {plain}, a random part of median length {trivial:.3f}")
    assert sum(ours) / len(ours) >= sum(plain) / len(plain) - 0.01
    assert min(ours) > 0.3 > 2 * trivial
