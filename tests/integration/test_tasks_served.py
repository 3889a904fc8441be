"""Each task through the service: it learns, and `Predict` on the evaluation data gives the job's own number."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

import shardyard
from helpers.chats import ANSWERS, chat, write_chats
from helpers.passages import write_passages
from helpers.questions import asked, write_nested
from helpers.small_pictures import write_folders
from helpers.task_table import ROWS
from helpers.workplace import Workplace

PEOPLE = ["Anna", "Bob", "Clara Smith"]
PLACES = ["Rome", "New York"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

TINY_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}


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


def wanderings(path: Path, number: int, seed: int) -> dict[str, list[str]]:
    """Users who go from each item on to the next one of a circle, or skip one; the rows are in no order."""
    draw = random.Random(seed)
    histories: dict[str, list[str]] = {}
    rows = []
    for user in range(number):
        at = draw.randrange(40)
        items = []
        for _ in range(draw.randint(4, 9)):
            items.append(f"i{at}")
            at = (at + draw.choice([1, 1, 1, 2])) % 40
        histories[f"u{user}"] = items
        rows += [f"u{user},{item},{1_700_000_000 + 60 * time}" for time, item in enumerate(items)]
    draw.shuffle(rows)
    path.write_text("user,item,time\n" + "\n".join(rows) + "\n")
    return histories


def test_what_comes_next_is_recommended(place: Workplace) -> None:
    histories = wanderings(place.folder / "interactions.csv", 300, 1)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.Recommendation(max_history=6, split="leave_two_out"),
            model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}),
            train_data=place.folder / "interactions.csv",
            optimization=shardyard.Optimization(epochs=15, learning_rate=1e-2, global_batch_size=32, seed=3),
            **ROWS["recommendation"].where(),
        )
        job = client.submit(spec, job_id="walks")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("walks")
        assert model.info.task == "recommendation" and model.info.inputs == ("items",)
        numbers = model.info.metrics
        assert {each.name for each in client.plan(spec).metrics} <= set(numbers)
        assert numbers["hr_10"] > 0.95 and numbers["popular_hr_10"] < 0.5
        held_out = [items for items in histories.values() if len(items) > 2]
        for prefix, last in (("", -2), ("test_", -1)):
            answers = model.predict([shardyard.Items(items[:last]) for items in held_out], top_k=10)
            ranks = []
            for items, answer in zip(held_out, answers, strict=True):
                ranked = [each.item for each in answer.items]
                assert len(ranked) == 10 and not set(ranked) & set(items[:last])
                ranks.append(ranked.index(items[last]) + 1 if items[last] in ranked else 0)
            found, reciprocal = sum(rank > 0 for rank in ranks), sum(1 / rank for rank in ranks if rank)
            assert found / len(ranks) == pytest.approx(numbers[f"{prefix}hr_10"], abs=1e-9)
            assert reciprocal / len(ranks) == pytest.approx(numbers[f"{prefix}mrr_10"], abs=1e-9)
        (answer,) = model.predict([shardyard.Items(["i3", "new", "i4"])], top_k=50, exclude_seen=False)
        assert answer.unknown_items == ("new",) and len(answer.items) == 40
        assert sum(each.score for each in answer.items) == pytest.approx(1, abs=1e-3)
        # More items than one message may have: the client sends them in several.
        assert len(model.predict([shardyard.Items(["i1", "i2"] * 100)] * 260, top_k=1)) == 260
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict([shardyard.Items(["i1"]), shardyard.Items(["i 1", "x"])])
        (violation,) = caught.value.violations
        assert violation.field == "instances[1].items" and "did you mean i1" in violation.message
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(["i1"])
        assert caught.value.reason == "TASK_MISMATCH"
    done = place.run("shardyard predict walks i7 i8 --top-k 2")
    assert done.returncode == 0 and done.stdout.startswith("i9 0."), done.stderr


def test_masked_items_teach_what_comes_next(place: Workplace) -> None:
    histories = wanderings(place.folder / "masked.csv", 300, 2)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.MaskedItem(max_history=8, mask_probability=0.3),
            model=shardyard.Architecture("bert", {**SMALL, "num_hidden_layers": 1}),
            train_data=place.folder / "masked.csv",
            optimization=shardyard.Optimization(epochs=20, learning_rate=1e-2, global_batch_size=32, seed=3),
            **ROWS["masked_item"].where(),
        )
        job = client.submit(spec, job_id="masked-walks")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("masked-walks")
        assert (model.info.task, model.info.inputs, model.info.parameters) == (
            "masked_item",
            ("items",),
            "recommendation",
        )
        numbers = model.info.metrics
        assert numbers["hr_10"] > 0.9 and numbers["popular_hr_10"] < 0.5
        held_out = [items for items in histories.values() if len(items) > 2]
        answers = model.predict([shardyard.Items(items[:-1]) for items in held_out], top_k=10)
        ranked = [[each.item for each in answer.items] for answer in answers]
        hits = [items[-1] in found for items, found in zip(held_out, ranked, strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(numbers["hr_10"], abs=1e-9)
        (answer,) = model.predict([shardyard.Items(["i3", "new", "i4"])], top_k=50, exclude_seen=False)
        assert answer.unknown_items == ("new",) and len(answer.items) == 40
        assert sum(each.score for each in answer.items) == pytest.approx(1, abs=1e-3)
    done = place.run("shardyard predict masked-walks i7 i8 --top-k 2")
    assert done.returncode == 0 and done.stdout.startswith("i9 0."), done.stderr


def test_names_and_places_are_found(place: Workplace) -> None:
    tagged(place.folder / "train.jsonl", 300, 1)
    held_out = tagged(place.folder / "held.jsonl", 60, 2)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.TokenClassification(max_length=24, overlap=8, class_weights={"O": 0.5}, label_all_pieces=True),
            model=shardyard.Architecture("bert", SMALL),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=150),
            train_data=place.folder / "train.jsonl",
            eval_data=shardyard.Data(place.folder / "held.jsonl", columns={"tokens": "tokens", "tags": "tags"}),
            optimization=shardyard.Optimization(epochs=20, learning_rate=5e-3, global_batch_size=16, seed=3),
            evaluation=shardyard.EvaluationPolicy(
                every=19, metric="f1", select_best=True, early_stopping=shardyard.EarlyStopping(patience=2)
            ),
            **ROWS["token_classification"].where(),
        )
        job = client.submit(spec, job_id="names")
        info = job.wait(timeout=300)
        assert info.state == "succeeded"
        events = list(job.watch())
        evaluations = [event.data for event in events if event.kind == "evaluation" and not event.data.is_partial]
        best = max(evaluations, key=lambda each: each.metrics["f1"])
        (stopped,) = [event.data for event in events if getattr(event.data, "reason", "") == "STOPPED_EARLY"]
        assert f"f1 did not improve in 2 evaluations: its best value is {best.metrics['f1']:.6g}" in stopped.message
        assert info.progress is not None and info.progress.step == best.step + 2 * 19 < info.progress.total_steps
        assert info.best_checkpoint.endswith(f"-s{best.step}")
        assert info.evaluation is not None and info.evaluation.is_final and info.evaluation.step == best.step
        model = client.model("names")
        assert model.info.task == "token_classification" and len(model.info.labels) == 5
        assert model.info.inputs == ("text", "words")
        numbers = model.info.metrics
        assert {each.name for each in client.plan(spec).metrics} <= set(numbers)
        assert numbers == best.metrics
        assert numbers["f1"] > 0.9 and numbers["f1_LOC"] > 0.9
        truth = [tag for row in held_out for tag in row["tags"]]
        assert numbers["majority_token_accuracy"] == pytest.approx(truth.count("O") / len(truth))
        assert numbers["majority_f1"] == 0
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
        measured_again(place, client, numbers)
    done = place.run("shardyard predict names 'Bob the dog'")
    assert done.returncode == 0 and done.stdout.startswith("Bob PER 0.")


def measured_again(place: Workplace, client: shardyard.Client, numbers: Mapping[str, float]) -> None:
    """An evaluation of `names` over two workers gives the numbers of its training, and leaves nothing else."""
    job = client.submit(
        shardyard.ModelEvaluation(data=place.folder / "held.jsonl"),
        model="model:names",
        resources=shardyard.Resources(workers=2),
        job_id="names-again",
    )
    info = job.wait(timeout=300)
    assert info.state == "succeeded" and (info.model, info.output_dataset) == ("", "")
    assert info.evaluation is not None and info.evaluation.is_final and info.evaluation.num_samples == 60
    assert dict(info.evaluation.metrics) == pytest.approx(dict(numbers), abs=1e-6)
    assert job.metrics("eval/f1")["eval/f1"].points[-1].value == pytest.approx(numbers["f1"], abs=1e-6)
    assert {each.info.name for each in client.models()}.isdisjoint({"names-again"}) and not job.checkpoints()
    with pytest.raises(shardyard.FailedPrecondition, match=r"its numbers are in info\.evaluation"):
        job.model()
    tagged(place.folder / "other.jsonl", 3, 4)
    (place.folder / "other.jsonl").write_text((place.folder / "other.jsonl").read_text().replace("-PER", "-ORG"))
    flags = "--task model-evaluation --model model:names"
    done = place.run(f"shardyard submit {flags} --data other.jsonl --job-id other")
    assert done.returncode == 1 and "LABEL_MISMATCH" in done.stderr and "does not know B-ORG, I-ORG" in done.stderr
    done = place.run(f"shardyard submit {flags} --data held.jsonl --job-id by-hand")
    assert done.returncode == 0 and f"f1 {numbers['f1']:.4g}" in done.stdout.splitlines()[-1], done.stdout + done.stderr


def test_questions_are_answered_as_they_were_learnt(place: Workplace) -> None:
    write_chats(place.folder / "chats.jsonl", times=12)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.Instruction(max_length=64),
            model=shardyard.Architecture("llama", SMALL | {"num_key_value_heads": 2}),
            tokenizer=shardyard.TrainedTokenizer(vocab_size=300),
            train_data=place.folder / "chats.jsonl",
            eval_data=place.folder / "chats.jsonl",
            optimization=shardyard.Optimization(epochs=20, learning_rate=1e-2, global_batch_size=8, seed=3),
            **ROWS["instruction"].where(),
        )
        job = client.submit(spec, job_id="chats")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("chats")
        assert model.info.task == "instruction" and model.info.inputs == ("messages", "text")
        assert model.info.metrics["token_accuracy"] > 0.99 and model.info.metrics["perplexity"] < 1.1
        answers = model.predict(list(ANSWERS), max_new_tokens=40)
        assert [answer.text for answer in answers] == list(ANSWERS.values())
        first, second = list(ANSWERS.items())[:2]
        asked = chat(*first, second[0])["messages"]
        (answer,) = model.predict([asked], max_new_tokens=40)
        assert answer.text == second[1]
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict([asked, asked[:2], [{"role": "robot", "content": "Hello"}]])
        assert [each.field for each in caught.value.violations] == [
            "instances[1].messages.messages[1]",
            "instances[2].messages.messages[0]",
        ]
        preferred(place, client)
    (place.folder / "asked.jsonl").write_text(json.dumps(asked) + "\nCount to three.\n")
    done = place.run("shardyard predict chats --file asked.jsonl")
    assert done.stdout.splitlines() == [second[1], ANSWERS["Count to three."]], done.stderr
    done = place.run("shardyard predict chats --message 'user: Who are you?'")
    assert done.stdout.strip() == ANSWERS["Who are you?"], done.stderr


def preferred(place: Workplace, client: shardyard.Client) -> None:
    """The model `chats` learns to give none of its answers any more."""
    rows = [{"prompt": ask, "chosen": "Nobody knows.", "rejected": answer} for ask, answer in ANSWERS.items()]
    (place.folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    spec = shardyard.JobSpec(
        shardyard.Preference(max_length=64),
        model="model:chats",
        train_data=place.folder / "preferences.jsonl",
        eval_data=place.folder / "preferences.jsonl",
        optimization=shardyard.Optimization(max_steps=16, learning_rate=1e-2, global_batch_size=8, seed=3),
        **ROWS["preference"].where(),
    )
    job = client.submit(spec, job_id="preferred")
    assert job.wait(timeout=300).state == "succeeded"
    # Before the first step the model is its own reference.
    assert job.metrics("loss")["loss"].points[0].value == pytest.approx(math.log(2), rel=1e-6)
    model = client.model("preferred")
    assert model.info.task == "preference" and model.info.inputs == ("messages", "text")
    numbers = model.info.metrics
    assert {each.name for each in client.plan(spec).metrics} <= set(numbers)
    assert numbers["reward_accuracy"] == 1 and numbers["reward_margin"] > 1 and numbers["loss"] < 0.4
    answers = {answer.text for answer in model.predict(list(ANSWERS), max_new_tokens=20)}
    assert answers.isdisjoint(ANSWERS.values())


def test_passages_are_ranked(place: Workplace) -> None:
    write_passages(place.folder / "passages.jsonl", 120, seed=1)
    held_out = write_passages(place.folder / "held-passages.jsonl", 20, seed=2)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.Reranking(max_length=24),
            model=shardyard.Architecture("bert", SMALL),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=120),
            train_data=place.folder / "passages.jsonl",
            eval_data=place.folder / "held-passages.jsonl",
            optimization=shardyard.Optimization(epochs=8, learning_rate=5e-3, global_batch_size=32, seed=3),
            **ROWS["reranking"].where(),
        )
        job = client.submit(spec, job_id="passages")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("passages")
        assert model.info.task == "reranking" and model.info.inputs == ("pair",)
        numbers = model.info.metrics
        assert {each.name for each in client.plan(spec).metrics} <= set(numbers)
        assert numbers["mrr_10"] > 0.95 and numbers["random_mrr_10"] < 0.6
        reciprocal = []
        for row in held_out:
            pairs = [(row["query"], text) for text in row["positives"] + row["negatives"]]
            scores = [each.value for each in model.predict(pairs)]
            assert all(score is not None and 0 < score < 1 for score in scores)
            reciprocal.append(1 / sum(score >= scores[0] for score in scores))
        assert sum(reciprocal) / len(reciprocal) == pytest.approx(numbers["mrr_10"], abs=1e-9)
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(["the dog"])
        assert "takes pairs of a query and a passage" in caught.value.violations[0].message
    done = place.run("shardyard predict passages 'is this dog good' 'the dog is cute'")
    assert done.returncode == 0 and float(done.stdout.split()[0]) > 0.5, done.stderr


def test_flowers_are_named(place: Workplace) -> None:
    write_folders(place.folder / "flowers" / "train", 40)
    held_out = write_folders(place.folder / "flowers" / "test", 10, first=100)
    (place.folder / "flowers" / "train" / "rose" / "Thumbs.db").write_bytes(b"not a picture")
    (place.folder / "flowers" / "train" / ".DS_Store").write_bytes(b"not a class")
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.ImageClassification(image_size=24, flip=0.5, crop_scale=0.8),
            model=shardyard.Architecture("resnet", TINY_RESNET),
            train_data=place.folder / "flowers" / "train",
            eval_data=place.folder / "flowers" / "test",
            optimization=shardyard.Optimization(epochs=6, learning_rate=5e-3, global_batch_size=16, seed=3),
            **ROWS["image_classification"].where(),
        )
        job = client.submit(spec, job_id="flowers")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("flowers")
        assert model.info.task == "image_classification" and model.info.labels == ("daisy", "rose", "violet")
        assert model.info.inputs == ("image",)
        numbers = model.info.metrics
        assert {each.name for each in client.plan(spec).metrics} <= set(numbers)
        assert numbers["accuracy"] > 0.9
        answers = model.predict(held_out)
        right = sum(answer.label == path.parent.name for answer, path in zip(answers, held_out, strict=True))
        assert right / len(held_out) == pytest.approx(numbers["accuracy"], abs=1e-9)
        (again,) = model.predict([held_out[0].read_bytes()])
        assert again.logits == pytest.approx(answers[0].logits, abs=1e-4)
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict([b"GIF89a, but no more of one", held_out[0], b""])
        assert {each.field for each in caught.value.violations} == {"instances[0].image", "instances[2].image"}
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(["rose.jpg"])
        assert "takes pictures" in caught.value.violations[0].message
    done = place.run("shardyard predict flowers flowers/test/rose/100.jpg flowers/test/violet")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 11 and lines[0].startswith("rose 0.")
    assert lines[0].endswith("flowers/test/rose/100.jpg")


def test_questions_are_answered_or_have_no_answer(place: Workplace) -> None:
    write_nested(place.folder / "questions.json", asked(600, 1, unanswered=0.25, filler=8))
    held_out = asked(60, 2, unanswered=0.25, filler=24)
    write_nested(place.folder / "held.json", held_out)
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.QuestionAnswering(max_length=20, overlap=8, max_answer_length=4),
            model=shardyard.Architecture("bert", SMALL),
            tokenizer=shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=120),
            train_data=place.folder / "questions.json",
            eval_data=place.folder / "held.json",
            optimization=shardyard.Optimization(epochs=10, learning_rate=5e-3, global_batch_size=16, seed=3),
            **ROWS["question_answering"].where(),
        )
        job = client.submit(spec, job_id="answers")
        assert job.wait(timeout=300).state == "succeeded"
        model = client.model("answers")
        assert model.info.task == "question_answering"
        numbers = model.info.metrics
        assert numbers["f1"] > 0.9 and numbers["no_answer_accuracy"] > 0.7
        questions = [shardyard.Question(row["question"], row["context"]) for row in held_out]
        answers = [answer.answer for answer in model.predict(questions)]
        wanted = [(row["answers"]["text"] or [""])[0] for row in held_out]
        assert all(row["context"][a.start : a.end] == a.text for row, a in zip(held_out, answers, strict=True))
        right = sum(answer.text == text for answer, text in zip(answers, wanted, strict=True))
        assert right / len(held_out) == pytest.approx(numbers["exact_match"], abs=1e-9)
        for answer in answers:
            assert (answer.score == answer.no_answer_score) == (not answer.text)
            assert sum(each.score for each in answer.candidates) + answer.no_answer_score <= 1 + 1e-6
        # However unlikely an answer is, it is given if the margin of no answer is never large enough.
        forced = model.predict([{"question": "Who came?", "context": "the rain"}], threshold=1e9, top_k=2)
        assert forced[0].answer.text and len(forced[0].answer.candidates) == 2
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict([("Who came?", "Anna"), shardyard.Question(" ", "Anna")])
        assert [each.field for each in caught.value.violations] == ["instances[1].question.question"]
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict(["Who came?"])
        assert "takes a question with its context" in caught.value.violations[0].message
    done = place.run("shardyard predict answers --question 'Who came?' --context 'the rain Bob dog'")
    assert done.returncode == 0 and done.stdout.startswith("Bob "), done.stdout + done.stderr
