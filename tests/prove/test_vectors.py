"""Vectors of texts: better than before training, and not worse than a plain loop on the same model, data and budget."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import shardyard
from helpers.plain_vectors import Embedder
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentence-embedding.yaml"
LEARNING_RATE, BATCH, SEED = 5e-5, 32, 1
KINDS = {"stsb": ("pearson", 40, 1), "xquad": ("mrr", 64, 2)}
"""The metric, the tokens of the longest text, and the passes over the data."""

pytestmark = pytest.mark.prove


def scored(name: str, number: int) -> list[dict[str, Any]]:
    """Sentences of STS-B, and how alike people say they are."""
    with (shared_data("stsb") / f"stsb-en-{name}.csv").open(encoding="utf-8", newline="") as file:
        return [{"text": one, "text_pair": two, "score": float(score)} for one, two, score in csv.reader(file)][:number]


def asked(first: int, last: int) -> list[dict[str, Any]]:
    """Questions of XQuAD's articles, each with the paragraph that answers it: several questions have the same one."""
    articles = json.loads((shared_data("xquad") / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    return [
        {"anchor": question["question"], "positive": paragraph["context"]}
        for article in articles[first:last]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def measured(vectors: tuple[torch.Tensor, torch.Tensor], rows: list[dict[str, Any]]) -> float:
    """Pearson's correlation with the scores, or the mean of 1 ÷ the place of a question's paragraph among all."""
    if "score" in rows[0]:
        return float(stats.pearsonr((vectors[0] * vectors[1]).sum(-1), [row["score"] for row in rows]).statistic)
    # Several questions have the same paragraph, which counts once.
    places = list({row["positive"]: at for at, row in enumerate(rows)}.values())
    cosines = vectors[0] @ vectors[1][places].T
    own = (vectors[0] * vectors[1]).sum(-1, keepdim=True)
    return float((1 / (cosines > own - 1e-6).sum(-1)).mean())


@pytest.mark.parametrize("kind", ["stsb", "xquad"])
def test_real_texts_are_at_most_a_point_behind_a_plain_loop(
    service: Served, bert: Path, tmp_path: Path, kind: str
) -> None:
    metric, length, epochs = KINDS[kind]
    train, held_out = (scored("train", 2000), scored("test", 1400)) if kind == "stsb" else (asked(0, 38), asked(38, 48))
    files = []
    for name, rows in (("--train", train), ("--eval", held_out)):
        path = tmp_path / f"{name.strip('-')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files += [name, str(path)]
    task = "spec.fine_tuning.sentence_embedding"
    given = [f"{task}.max_length={length}", f"spec.optimization.epochs={epochs}", f"job_id=vectors-{kind}"]
    given += [f"spec.optimization.learning_rate={LEARNING_RATE}", f"spec.optimization.global_batch_size={BATCH}"]
    given += [f"spec.optimization.seed={SEED}"]
    given += [f"{task}.lowest_score=0", f"{task}.highest_score=5"] if kind == "stsb" else []
    flags = [part for each in given for part in ("--set", each)]
    done = service.run(
        str(BIN / "shardyard"), "submit", str(EXAMPLE), "--model", str(bert), *files, *flags, timeout_s=3000
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = ("text", "text_pair") if kind == "stsb" else ("anchor", "positive")
    sides = [[row[name] for row in held_out] for name in names]
    with shardyard.Client(service.address) as client:
        model = client.model(f"vectors-{kind}")
        ours = tuple(torch.tensor([each.values for each in model.embed(texts)]) for texts in sides)
        number = model.info.metrics[metric]
    assert number == pytest.approx(measured(ours, held_out), abs=1e-4)
    plain = Embedder(bert, length, SEED)
    before = measured(tuple(plain.embed(texts) for texts in sides), held_out)
    scale = [(row[names[0]], row[names[1]], row["score"] / 5 if kind == "stsb" else None) for row in train]
    plain.train(scale, epochs=epochs, learning_rate=LEARNING_RATE, batch=BATCH)
    theirs = measured(tuple(plain.embed(texts) for texts in sides), held_out)
    print(f"{kind}: {metric} {number:.4f}, plain transformers {theirs:.4f}, before training {before:.4f}", flush=True)
    assert number >= theirs - 0.01 and number > before
