"""Each task through the service: it learns, and `Predict` on the evaluation data gives the job's own number."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardyard
from helpers.workplace import Workplace, workplace

PEOPLE = ["Anna", "Bob", "Clara Smith"]
PLACES = ["Rome", "New York"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("tasks")) as place:
        yield place


def tagged(path: Path, number: int, seed: int) -> list[dict[str, list[str]]]:
    """Sentences in which names and places are what their words say."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        row: dict[str, list[str]] = {"tokens": [], "tags": []}
        for _ in range(draw.randint(3, 9)):
            kind = draw.choice(["PER", "LOC", "", ""])
            words = draw.choice({"PER": PEOPLE, "LOC": PLACES}.get(kind, ["dog", "the", "film"])).split()
            row["tokens"] += words
            row["tags"] += [f"{'I' if at else 'B'}-{kind}" if kind else "O" for at in range(len(words))]
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_names_and_places_are_found(place: Workplace) -> None:
    tagged(place.folder / "train.jsonl", 300, 1)
    held_out = tagged(place.folder / "held.jsonl", 60, 2)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.TokenClassification(max_length=24, overlap=8),
            model=shardyard.Architecture("bert", SMALL),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=150),
            train_data=place.folder / "train.jsonl",
            eval_data=shardyard.Data(place.folder / "held.jsonl", columns={"tokens": "tokens", "tags": "tags"}),
            optimization=shardyard.Optimization(epochs=6, learning_rate=5e-3, global_batch_size=16, seed=3),
            parallelism=shardyard.Parallelism(zero_stage=2),
            resources=shardyard.Resources(workers=2),
        )
        job = client.submit(spec, job_id="names")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("names")
        assert model.info.task == "token_classification" and len(model.info.labels) == 5
        numbers = model.info.metrics
        assert numbers["f1"] > 0.9 and numbers["f1_LOC"] > 0.9
        answers = model.predict([shardyard.Words(row["tokens"]) for row in held_out])
        tags = [tag.tag for answer in answers for tag in answer.tags]
        right = sum(
            ours == theirs for ours, theirs in zip(tags, (t for row in held_out for t in row["tags"]), strict=True)
        )
        assert right / len(tags) == pytest.approx(numbers["token_accuracy"], abs=1e-9)
        text = "the  film\nClara Smith the New York"
        (answer,) = model.predict([text])
        found = [(each.label, text[each.start : each.end]) for each in answer.entities]
        assert found == [("PER", "Clara Smith"), ("LOC", "New York")]
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict([("a", "b")])
        assert "instances[0].pair" in {each.field for each in caught.value.violations}
    done = place.run("shardyard predict names 'Bob the dog'")
    assert done.returncode == 0 and done.stdout.startswith("Bob PER 0.")
