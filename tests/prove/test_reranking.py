"""Paragraphs for questions: ranked as well as by a plain loop on the same model, data and budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardyard
from helpers.chats import write_lines
from helpers.plain_reranker import CrossEncoder, Pair, mrr, shared_words
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EPOCHS, LEARNING_RATE, BATCH, LENGTH, SEED = 2, 2e-4, 32, 96, 1
TRAINED_ON, HELD_OUT = slice(24), slice(40, 48)
"""Articles."""

EXAMPLE = Path(__file__).parents[2] / "examples" / "reranking.yaml"
pytestmark = pytest.mark.prove


def asked(articles: list[dict[str, Any]], others: int) -> list[dict[str, Any]]:
    """Questions with the paragraph that answers each, and the next ones of the same article, which do not."""
    found = []
    for article in articles:
        paragraphs = article["paragraphs"]
        for at, own in enumerate(paragraphs):
            wrong = [paragraphs[(at + more) % len(paragraphs)]["context"] for more in range(1, others + 1)]
            found += [
                {"query": each["question"], "positives": [own["context"]], "negatives": wrong} for each in own["qas"]
            ]
    return found


def pairs_of(rows: list[dict[str, Any]]) -> list[Pair]:
    names = (("positives", 1.0), ("negatives", 0.0))
    return [(row["query"], text, label) for row in rows for name, label in names for text in row[name]]


def test_the_right_paragraphs_are_found_as_often_as_by_a_plain_loop(
    service: Served, bert: Path, tmp_path: Path
) -> None:
    articles = json.loads((shared_data("xquad") / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    train, held_out = asked(articles[TRAINED_ON], 1), asked(articles[HELD_OUT], 4)
    files = ["--train", str(write_lines(tmp_path / "train.jsonl", train))]
    files += ["--eval", str(write_lines(tmp_path / "eval.jsonl", held_out))]
    budget = {"epochs": EPOCHS, "learning_rate": LEARNING_RATE, "global_batch_size": BATCH, "seed": SEED}
    given = [f"spec.optimization.{name}={value}" for name, value in budget.items()]
    given += [
        f"spec.fine_tuning.reranking.max_length={LENGTH}",
        "job_id=paragraphs",
        "spec.evaluation.select_best=false",
    ]
    flags = [part for each in given for part in ("--set", each)]
    done = service.run(
        str(BIN / "shardyard"), "submit", str(EXAMPLE), "--model", str(bert), *files, *flags, timeout_s=3000
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    pairs = pairs_of(held_out)
    with shardyard.Client(service.address) as client:
        model = client.model("paragraphs")
        answers = model.predict([pair[:2] for pair in pairs])
        numbers = model.info.metrics
    # The job's own number, by another count and by the model that answers.
    assert numbers["mrr_10"] == pytest.approx(mrr(pairs, [answer.logits[0] for answer in answers]), abs=1e-3)
    plain = CrossEncoder(bert, LENGTH, SEED)
    before = mrr(pairs, plain.score(pairs))
    plain.train(pairs_of(train), epochs=EPOCHS, learning_rate=LEARNING_RATE, batch=BATCH)
    theirs, words = mrr(pairs, plain.score(pairs)), mrr(pairs, shared_words(pairs))
    print(
        f"MRR: ours {numbers['mrr_10']:.4f}, plain transformers {theirs:.4f}, before training {before:.4f}, in random "
        f"order {numbers['random_mrr_10']:.4f}, by shared words {words:.4f}; NDCG: ours {numbers['ndcg_10']:.4f}",
        flush=True,
    )
    assert numbers["mrr_10"] >= theirs - 0.01 and numbers["mrr_10"] > max(before, numbers["random_mrr_10"])
