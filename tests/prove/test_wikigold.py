"""Entities of Wikigold: not worse than a plain transformers loop on the same model, data and budget."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import shardyard
from helpers.plain_tagger import Sentences, entity_f1, read_conll, train_and_tag
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EPOCHS, LEARNING_RATE, BATCH, HELD_OUT, SEEDS = 4, 3e-4, 16, 300, (1, 2)
EXAMPLE = Path(__file__).parents[2] / "examples" / "ner.yaml"
pytestmark = pytest.mark.prove


def write(path: Path, sentences: Sentences) -> Path:
    texts = ("\n".join(f"{word} {tag}" for word, tag in zip(*sentence, strict=True)) for sentence in sentences)
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_wikigold_is_at_most_a_point_behind_a_plain_loop(service: Served, bert: Path, tmp_path: Path) -> None:
    sentences = read_conll(shared_data("wikigold") / "wikigold.conll.txt")
    random.Random(0).shuffle(sentences)
    held_out, train = sentences[:HELD_OUT], sentences[HELD_OUT:]
    truth = [tags for _, tags in held_out]
    files = ["--train", str(write(tmp_path / "train.conll", train))]
    files += ["--eval", str(write(tmp_path / "held.conll", held_out))]
    budget = {"epochs": EPOCHS, "learning_rate": LEARNING_RATE, "global_batch_size": BATCH}
    ours, plain = [], []
    for seed in SEEDS:
        settings = [f"spec.optimization.{name}={value}" for name, value in {**budget, "seed": seed}.items()]
        flags = [part for setting in [*settings, f"job_id=wikigold-{seed}"] for part in ("--set", setting)]
        done = service.run(
            str(BIN / "shardyard"), "submit", str(EXAMPLE), "--model", str(bert), *files, *flags, timeout_s=3000
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        with shardyard.Client(service.address) as client:
            model = client.model(f"wikigold-{seed}")
            answers = model.predict([shardyard.Words(words) for words, _ in held_out])
            numbers = model.info.metrics
        found = [[tag.tag for tag in answer.tags] for answer in answers]
        # The job's own number, counted by another library and by the model that answers.
        assert entity_f1(truth, found) == pytest.approx(numbers["f1"], abs=1e-9)
        ours.append(numbers["f1"])
        tags = train_and_tag(bert, train, held_out, epochs=EPOCHS, learning_rate=LEARNING_RATE, batch=BATCH, seed=seed)
        plain.append(entity_f1(truth, tags))
    print(f"entity F1: ours {ours}, plain transformers {plain}, the most frequent tag {numbers['majority_f1']}")
    assert sum(ours) / len(ours) >= sum(plain) / len(plain) - 0.01
    assert min(ours) > 0.65 > numbers["majority_f1"]
