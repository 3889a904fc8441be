"""Vectors of texts and classes of the caller's, through the service and its client."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import shardyard
from helpers.pair_specs import sure_folder
from helpers.sentence_specs import TINY
from helpers.task_table import ROWS
from helpers.tiny_folders import save_folder
from helpers.workplace import Workplace


def test_texts_that_belong_together_are_found_and_compared(place: Workplace) -> None:
    draw = random.Random(4)
    topics = [[f"a{at}" for at in draw.sample(range(20), 3)] for _ in range(260)]
    rows = [
        {"anchor": " ".join(words), "positive": " ".join(word.replace("a", "b") for word in reversed(words))}
        for words in topics
    ]
    for name, some in (("vectors", rows[:220]), ("vectors-held", rows[220:])):
        (place.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.SentenceEmbedding(max_length=8, pooling="mean"),
            model=shardyard.Architecture("bert", TINY),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=120),
            train_data=place.folder / "vectors.jsonl",
            eval_data=place.folder / "vectors-held.jsonl",
            optimization=shardyard.Optimization(epochs=10, learning_rate=5e-3, global_batch_size=32, seed=3),
            **ROWS["sentence_embedding"].where(),
        )
        job = client.submit(spec, job_id="vectors")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("vectors")
        assert (model.info.task, model.info.inputs, model.info.parameters) == ("sentence_embedding", ("pair",), "")
        numbers = model.info.metrics
        assert {each.name for each in client.plan(spec).metrics} <= set(numbers)
        assert numbers["recall_1"] > 0.8
        anchors, positives = (
            [each.values for each in model.embed([row[name] for row in rows[220:]])] for name in ("anchor", "positive")
        )
        products = [[sum(map(float.__mul__, one, other)) for other in positives] for one in anchors]
        firsts = [row.index(max(row)) == at for at, row in enumerate(products)]
        assert sum(firsts) / len(firsts) == pytest.approx(numbers["recall_1"], abs=1e-9)
        (answer,) = model.predict([(rows[220]["anchor"], rows[221]["positive"])])
        assert answer.value == pytest.approx(products[0][1], abs=1e-5)
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(["a1 a2", ("a1", "b1")])
        assert [each.field for each in caught.value.violations] == ["instances[0].text"]
        assert "get the vector of one text with Embed" in caught.value.violations[0].message
    done = place.run("shardyard predict vectors 'a1 a2 a3' 'b3 b2 b1' 'a1 a2 a3' 'b7 b8 b9'")
    one, other = (float(line.split()[0]) for line in done.stdout.splitlines())
    assert done.returncode == 0 and one > other, done.stderr


def encoder_decoder(folder: Path, names: tuple[str, ...]) -> Path:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    return sure_folder(folder, "Bart", "ForSequenceClassification", std=0.3, **labels)


def test_a_model_that_knows_entailment_sorts_texts_into_classes_of_the_callers(place: Workplace) -> None:
    names = ("contradiction", "neutral", "entailment")
    save_folder(place.folder / "nli", "BertForSequenceClassification", id2label=dict(enumerate(names)))
    texts, labels = ["the dog is cute", "not a bad film"], ["good", "bad", "very cute"]
    with shardyard.Client(place.address) as client:
        model = client.upload_model(place.folder / "nli")
        answers = model.predict(texts, labels=labels, hypothesis_template="this is {}")
        assert [tuple(answer.scores) for answer in answers] == [tuple(labels)] * 2
        for text, answer in zip(texts, answers, strict=True):
            pairs = model.predict([(text, f"this is {label}") for label in labels])
            assert answer.logits == pytest.approx([each.logits[2] for each in pairs], abs=1e-5)
            assert answer.label == labels[answer.logits.index(max(answer.logits))]
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(texts, labels=["good", "good"])
        assert caught.value.violations[0].field == "zero_shot.labels"
        both = client.upload_model(encoder_decoder(place.folder / "bart-nli", names))
        assert both.info.task == "text_classification" and both.info.inputs[:2] == ("text", "pair")
        answered = both.predict(texts, labels=labels)
        pairs = both.predict([(text, f"This example is {label}.") for text in texts for label in labels])
        assert [logit for answer in answered for logit in answer.logits] == pytest.approx(
            [each.logits[2] for each in pairs], abs=1e-5
        )
    flags = "--label good --label bad --label 'very cute' --hypothesis-template 'this is {}'"
    done = place.run(f"shardyard predict {model.id} 'the dog is cute' {flags}")
    assert done.stdout == f"{answers[0].label} {answers[0].score:.3f}\tthe dog is cute\n", done.stderr
    done = place.run(f"shardyard predict {model.id} 'the dog is cute' --label good --multi-label --json")
    assert done.returncode == 0 and len(json.loads(done.stdout)[0]["scores"]) == 1, done.stderr
