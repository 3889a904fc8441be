"""Explanations through the service: which words, regions of a picture and items an answer comes from."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import shardyard
from helpers.small_pictures import picture, save_vit
from helpers.tiny_folders import WORDS, save_folder
from helpers.workplace import Workplace

TAGS = ("O", "B-PER", "I-PER")
CLASSES = ("bad", "good")
ITEMS = ("bread", "butter", "tea", "milk")
TEXT = "the dog , the cat is not cute ."


def named(names: tuple[str, ...]) -> dict[str, object]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}


def save_pictures(folder: Path) -> Path:
    save_vit(folder)
    torch.manual_seed(1)
    config = transformers.ViTConfig.from_pretrained(folder, **named(CLASSES), initializer_range=0.3)
    transformers.ViTForImageClassification(config).eval().save_pretrained(folder)
    return folder


def save_items(folder: Path) -> Path:
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=len(ITEMS) + 1, n_embd=16, n_layer=1, n_head=2, n_positions=4, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
    (folder / "items.json").write_text(json.dumps({"format": 1, "max_history": 4, "items": ITEMS}))
    (folder / "shardyard.json").write_text(json.dumps({"format": 1, "task": "recommendation"}))
    return folder


@pytest.fixture(scope="module")
def models(place: Workplace) -> Iterator[dict[str, shardyard.Model]]:
    """A tiny model of each kind, with random weights."""
    at = place.folder / "explained"
    folders = {
        "texts": save_folder(at / "texts", "BertForSequenceClassification", **named(CLASSES)),
        "number": save_folder(at / "number", "BertForSequenceClassification", num_labels=1),
        "bytes": save_folder(at / "bytes", "GPT2ForSequenceClassification", pad_token_id=256, **named(CLASSES)),
        "tags": save_folder(at / "tags", "BertForTokenClassification", **named(TAGS)),
        "questions": save_folder(at / "questions", "BertForQuestionAnswering"),
        "pictures": save_pictures(at / "pictures"),
        "items": save_items(at / "items"),
        "masks": save_folder(at / "masks", "BertForMaskedLM"),
    }
    with shardyard.Client(place.address) as client:
        yield {name: client.upload_model(folder) for name, folder in folders.items()}


def total(found: shardyard.Explanation) -> float:
    shares = [each.score for each in found.attributions] + list(found.regions.values if found.regions else ())
    return sum(shares) + found.rest


def check(found: shardyard.Explanation) -> None:
    """Completeness, as the answer says it."""
    difference = found.output - found.baseline_output
    assert found.is_complete and found.completeness_error <= 0.02
    assert abs(total(found) - difference) == pytest.approx(found.completeness_error * abs(difference), abs=1e-9)
    assert (16 <= found.steps <= 256 and any(each.score for each in found.attributions)) or found.regions


def refused(model: shardyard.Model, item: object, **fields: object) -> dict[str, str]:
    """The violations of a refused explanation."""
    with pytest.raises(shardyard.InvalidArgument) as caught:
        model.explain(item, **fields)  # type: ignore[arg-type]
    return {each.field: each.message for each in caught.value.violations}


def test_a_class_is_explained_by_the_words_of_a_text(models: dict[str, shardyard.Model]) -> None:
    model, text = models["texts"], "  The dog,the cat is NOT cute ."
    found = model.explain(text)
    check(found)
    assert found == model.explain(text), "the same question has the same answer"
    (answer,) = model.predict([text])
    assert found.prediction == answer and found.target == answer.label
    assert found.output == pytest.approx(answer.logits[CLASSES.index(found.target)], abs=1e-5)
    assert {text[each.start : each.end] == each.text for each in found.attributions} == {True}
    words = ["The", "dog", ",", "the", "cat", "is", "NOT", "cute", "."]
    assert [each.text for each in found.attributions] == words and {each.part for each in found.attributions} == {
        "text"
    }
    assert "[MASK]" in found.baseline and found.rest == 0
    assert [abs(each.score) for each in found.top(3)] == sorted(abs(e.score) for e in found.attributions)[:-4:-1]
    other = model.explain(text, target=next(name for name in CLASSES if name != found.target), max_steps=64)
    check(other)
    assert other.target != found.target and other.output != found.output
    pair = model.explain(("the dog", "is not the cat"))
    check(pair)
    assert [(each.part, each.text) for each in pair.attributions[1:3]] == [("text", "dog"), ("text_pair", "is")]
    assert model.explain("").attributions == ()


def test_a_number_is_explained_and_has_no_target(models: dict[str, shardyard.Model]) -> None:
    found = models["number"].explain(TEXT)
    check(found)
    assert (found.target, found.output) == ("", pytest.approx(found.prediction.value, abs=1e-5))
    assert "gives a number" in refused(models["number"], TEXT, target="good")["target"]


def test_bytes_become_words_in_a_model_that_reads_its_last_token(models: dict[str, shardyard.Model]) -> None:
    text = "né 🙂 東京<|endoftext|>"
    found = models["bytes"].explain(text)
    check(found)
    assert [each.text for each in found.attributions if each.text.strip()][:4] == ["né", "🙂", "東", "京"]
    assert found.output == pytest.approx(max(found.prediction.logits), abs=1e-5)


def test_the_tag_of_a_word_is_explained_by_the_words_around_it(models: dict[str, shardyard.Model]) -> None:
    model = models["tags"]
    found = model.explain(TEXT)
    check(found)
    tags = found.prediction.tags
    named = [tag.score for tag in tags if tag.tag != "O"] or [tag.score for tag in tags]
    assert found.word is not None and tags[found.word].score == max(named) and found.target == tags[found.word].tag
    assert len(found.attributions) == len(tags)
    other = model.explain(shardyard.Words(["the", "dog", "is"]), word=1, target="B-PER")
    check(other)
    assert (other.word, other.target, [each.part for each in other.attributions]) == (1, "B-PER", ["words"] * 3)
    long = " ".join(["the dog is cute ."] * 20)  # Several windows: the last word is in the last.
    last = model.explain(long, word=99)
    check(last)
    assert last.attributions[-1].end == len(long) and last.attributions[0].start > 0
    assert "100 words" in refused(model, long, word=100)["word"]
    assert "no token" in refused(model, shardyard.Words(["the", " "]), word=1)["word"]
    assert "no word" in refused(model, "  ")["instance.text"]


def test_an_answer_is_explained_by_question_and_context(models: dict[str, shardyard.Model]) -> None:
    model, context = models["questions"], " ".join(["the dog is cute .", "my cat , a film"] * 6)
    found = model.explain(shardyard.Question(" the dog ?", context))
    check(found)
    answer = found.prediction.answer
    assert answer is not None and found.target == answer.text
    assert [(e.text, e.start) for e in found.attributions[:3]] == [("the", 1), ("dog", 5), ("?", 9)]
    window = [each for each in found.attributions if each.part == "context"]
    assert window[0].start <= answer.start and answer.end <= window[-1].end and len(window) < len(context.split())
    assert {each.part for each in model.explain(("the dog ?", context)).attributions} == {"text", "text_pair"}
    assert "leave the target out" in refused(model, ("the dog ?", context), target="the dog")["target"]


def test_a_class_is_explained_by_the_regions_of_a_picture(models: dict[str, shardyard.Model], place: Workplace) -> None:
    model, path = models["pictures"], place.folder / "rose.png"
    picture("rose", 1, side=48).resize((60, 40)).save(path)
    found = model.explain(path)
    check(found)
    regions = found.regions
    assert regions is not None and (regions.rows, regions.columns, len(regions.values)) == (3, 3, 9)
    box = (regions.left, regions.top, regions.right, regions.bottom, regions.width, regions.height)
    assert box == (0, 0, 60, 40, 60, 40) and "grey" in found.baseline and not found.attributions
    drawn = Image.open(io.BytesIO(found.overlay(path)))
    assert (drawn.format, drawn.size) == ("PNG", (60, 40)) and drawn.tobytes() != Image.open(path).convert(
        "RGB"
    ).tobytes()
    with pytest.raises(shardyard.InvalidArgument, match="60 × 40 were explained"):
        found.overlay(picture_bytes(24))
    with pytest.raises(shardyard.InvalidArgument, match="not that of a picture"):
        models["texts"].explain(TEXT).overlay(path)
    assert "not a JPEG" in refused(model, b"no picture")["instance.image"]


def picture_bytes(side: int) -> bytes:
    made = io.BytesIO()
    picture("daisy", 2, side=side).save(made, "PNG")
    return made.getvalue()


def test_a_recommended_item_is_explained_by_the_items_of_the_history(models: dict[str, shardyard.Model]) -> None:
    model, history = models["items"], ["bread", "nope", "tea", "tea", "bread", "butter"]
    found = model.explain(shardyard.Items(history))
    check(found)
    assert [(e.text, e.start, e.end) for e in found.attributions] == [
        (item, at, at + 1) for at, item in enumerate(history)
    ]
    # The model reads the latest four that it knows.
    assert [each.unread for each in found.attributions] == [True, True, False, False, False, False]
    assert found.target == found.prediction.items[0].item and found.attributions[0].score == 0
    other = model.explain(shardyard.Items(history), target="tea")
    check(other)
    assert other.target == "tea" and other.output != found.output
    assert "did you mean bread?" in refused(model, shardyard.Items(history), target="bred")["target"]
    assert "catalogue" in refused(model, shardyard.Items(["nope"]))["instance.items"]


def test_what_cannot_be_explained_is_refused_with_what_can_and_all_at_once(
    models: dict[str, shardyard.Model], place: Workplace
) -> None:
    found = refused(models["masks"], "the [MASK]")["model"]
    assert "masked_lm" in found and "text_classification (words)" in found and "recommendation (items)" in found
    with shardyard.Client(place.address) as client:
        assert "bare backbone" in refused(client.upload_model(place.folder / "bert"), TEXT)["model"]
    found = refused(models["texts"], shardyard.Items(["tea"]), target="god", word=1)
    assert set(found) == {"instance.items", "target", "word"} and "did you mean good?" in found["target"]
    assert refused(models["texts"], TEXT, max_steps=5)["max_steps"]
    with pytest.raises(shardyard.InvalidArgument, match="max_steps"):
        models["texts"].explain(TEXT, max_steps="many")  # type: ignore[arg-type]


def test_a_page_shows_texts_as_they_are_written(models: dict[str, shardyard.Model]) -> None:
    text = "<script>alert('the dog')</script> & \"cute\" <img src=x>"
    page = models["texts"].explain(text).to_html()
    assert "<script" not in page and "<img" not in page and "src=" not in page and "http" not in page
    assert "&lt;" in page and "&amp;" in page and page.count("<b ") == len(models["texts"].explain(text).attributions)
    item = '"><svg onload=x>'
    page = models["items"].explain(shardyard.Items(["tea", item])).to_html()
    assert "<svg" not in page and "not read" in page


def test_the_command_shows_words_numbers_and_files(models: dict[str, shardyard.Model], place: Workplace) -> None:
    ids = {name: model.id for name, model in models.items()}
    done = place.run(f"shardyard explain {ids['texts']} '{TEXT}' --html page.html")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[1].startswith("Explained: ") and lines[2] == "text:" and "dog[" in lines[3] and "\x1b" not in done.stdout
    )
    assert "[MASK]" in lines[-1] and "Explanation" not in lines[0]
    assert "<b " in (place.folder / "page.html").read_text()
    coloured = place.run(f"FORCE_COLOR=1 shardyard explain {ids['texts']} '{TEXT}'")
    assert "\x1b[" in coloured.stdout and "dog[" not in coloured.stdout
    done = place.run(f"shardyard explain {ids['texts']} '{TEXT}' --json --target bad")
    found = json.loads(done.stdout)
    assert found["target"] == "bad" and found["attributions"][1]["text"] == "dog"
    picture("violet", 3).save(place.folder / "violet.png")
    done = place.run(f"shardyard explain {ids['pictures']} violet.png --overlay over.png --html violet.html")
    assert done.returncode == 0, done.stderr
    assert Image.open(place.folder / "over.png").size == (24, 24)
    assert "data:image/png;base64," in (place.folder / "violet.html").read_text()
    assert {"+9", "-9"} & set(done.stdout.split())
    done = place.run(f"shardyard explain {ids['questions']} --question 'the dog ?' --context '{TEXT}'")
    assert done.returncode == 0 and "question:" in done.stdout and "context:" in done.stdout
    done = place.run(f"shardyard explain {ids['items']} bread tea nope")
    assert done.returncode == 0 and "(not read)  nope" in done.stdout
    for wrong, why in (("a b", "one input"), ("a --overlay x.png", "--overlay"), ("a --target x", "not a class")):
        done = place.run(f"shardyard explain {ids['texts']} {wrong}")
        assert done.returncode != 0 and why in done.stderr, done.stderr


def test_a_model_that_looks_at_one_word_is_explained_by_that_word(place: Workplace) -> None:
    """Trained here: a text is `has` if the word is in it. In 95 of 100 texts that have it, it is the largest share."""
    save_folder(place.folder / "looks", "BertModel")
    draw, others = random.Random(3), [word for word in WORDS if word != "dog"]
    rows = []
    for number in range(600):
        words = draw.choices(others, k=draw.randint(5, 10))
        if number % 2:
            words[draw.randrange(len(words))] = "dog"
        rows.append((" ".join(words), "has" if number % 2 else "lacks"))
    lines = [f'"{text}",{label}' for text, label in rows]
    (place.folder / "looks.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    with shardyard.Client(place.address) as client:
        job = client.submit(
            shardyard.TextClassification(),
            model=place.folder / "looks",
            train_data=place.folder / "looks.csv",
            optimization=shardyard.Optimization(epochs=8, learning_rate=3e-3, global_batch_size=20, seed=3),
            job_id="looks",
        )
        assert job.wait(timeout=300).state == "succeeded"
        model = job.model()
        assert model.info.metrics["accuracy"] > 0.95
        texts = [text for text, label in rows if label == "has"][:200]
        found = [model.explain(text, target="has") for text in texts]
    assert sum(each.top(1)[0].text == "dog" and each.top(1)[0].score > 0 for each in found) >= 190
    assert sum(each.is_complete for each in found) >= 190
