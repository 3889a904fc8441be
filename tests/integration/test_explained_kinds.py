"""Explanations of models of many kinds through the service: what users of other explainers reported to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import shardyard
from helpers.small_pictures import picture
from helpers.tiny_folders import WORDS, bert_tokenizer, save_folder
from helpers.workplace import Workplace

LABELS = {"id2label": {0: "bad", 1: "good", 2: "fair"}, "label2id": {"bad": 0, "good": 1, "fair": 2}}
SIZES = {"vocab_size": 5 + len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
AFTER_PADDING = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 34, "pad_token_id": 0}
TEXT = "the dog is not cute , the dog is bad ."


def save(folder: Path, kind: str, tokenizer: Any = None, **settings: Any) -> Path:
    """A folder of a class for sequences or pictures with weights large enough to say something."""
    torch.manual_seed(4)
    config = getattr(transformers, f"{kind}Config")(**settings, **LABELS)
    what = "Image" if tokenizer is None else "Sequence"
    model = getattr(transformers, f"{kind}For{what}Classification")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def uploaded(place: Workplace, folder: Path) -> shardyard.Model:
    """The model, whose client stays open as long as the test holds it."""
    return shardyard.Client(place.address).upload_model(folder)


def check(found: shardyard.Explanation) -> None:
    shares = [each.score for each in found.attributions] + list(found.regions.values if found.regions else ())
    difference = found.output - found.baseline_output
    assert found.is_complete and abs(sum(shares) + found.rest - difference) <= 0.02 * abs(difference) + 1e-9
    assert max(map(abs, shares)) > 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("XLMRoberta", AFTER_PADDING),
        ("Camembert", AFTER_PADDING),
        ("MPNet", AFTER_PADDING),
        ("XLNet", {"vocab_size": SIZES["vocab_size"], "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}),
        ("DistilBert", {"vocab_size": SIZES["vocab_size"], "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}),
        ("Albert", {**SIZES, "embedding_size": 8, "intermediate_size": 32}),
        ("DebertaV2", {**SIZES, "intermediate_size": 32, "relative_attention": True, "pos_att_type": "p2c|c2p"}),
    ],
)
def test_encoders_that_other_explainers_fail_on(place: Workplace, kind: str, settings: dict[str, Any]) -> None:
    """Positions after the padding, tokens before rows, no types of texts, shared layers, relative positions."""
    model = uploaded(place, save(place.folder / f"kind-{kind}", kind, bert_tokenizer(), **settings))
    found = model.explain(TEXT)
    check(found)
    # Repeated words are all there.
    assert [each.text for each in found.attributions] == TEXT.split()
    (answer,) = model.predict([TEXT])
    assert found.target == answer.label and found.output == pytest.approx(max(answer.logits), abs=1e-4)
    pair = model.explain(("the dog", "is not cute"))
    check(pair)
    assert [each.part for each in pair.attributions] == ["text"] * 2 + ["text_pair"] * 3


def test_texts_beyond_the_limit_are_explained_as_far_as_they_are_read(place: Workplace) -> None:
    texts = uploaded(place, save_folder(place.folder / "kind-long", "BertForSequenceClassification", **LABELS))
    found = texts.explain("the dog is cute . " * 2000)
    check(found)
    assert len(found.attributions) == 30 and found.attributions[-1].end < 150
    questions = uploaded(place, save_folder(place.folder / "kind-questions", "BertForQuestionAnswering"))
    context = " ".join(["the dog is cute ."] * 800 + ["my cat sleeps"])
    asked = questions.explain(shardyard.Question("a cat ?", context))
    check(asked)
    assert asked.prediction.answer is not None and asked.target == asked.prediction.answer.text
    blank = questions.explain(shardyard.Question("film " * 100, context[:200]))
    assert len([each for each in blank.attributions if each.part == "question"]) < 20


def test_no_answer_is_explained_as_one(place: Workplace) -> None:
    folder = save_folder(place.folder / "kind-none", "BertForQuestionAnswering")
    settings = {"task": "question_answering", "max_length": 32, "overlap": 4, "max_answer_length": 4}
    about = {"format": 1, **settings, "allow_no_answer": True, "metrics": {"no_answer_threshold": -1000.0}}
    (folder / "shardyard.json").write_text(json.dumps(about))
    found = uploaded(place, folder).explain(shardyard.Question("the dog ?", " ".join(WORDS[:12] * 5)))
    check(found)
    assert found.prediction.answer is not None and found.prediction.answer.text == found.target == ""
    assert {each.part for each in found.attributions} == {"question", "context"}


def test_each_class_of_several_is_explained_by_itself(place: Workplace) -> None:
    folder = place.folder / "kind-several"
    save_folder(folder, "BertForSequenceClassification", **LABELS, problem_type="multi_label_classification")
    model = uploaded(place, folder)
    found = {name: model.explain(TEXT, target=name) for name in ("bad", "good", "fair")}
    for at, each in enumerate(found.values()):
        check(each)
        assert each.output == pytest.approx(each.prediction.logits[at], abs=1e-5)
    likeliest = max(found.values(), key=lambda each: each.output)
    assert model.explain(TEXT) == likeliest


def test_more_steps_are_used_only_until_the_shares_add_up(place: Workplace) -> None:
    """A model that is steep near the baseline: few gradients are not enough, and more change nothing any more."""
    folder = save_folder(place.folder / "kind-steep", "BertForSequenceClassification", **LABELS, initializer_range=2.0)
    model = uploaded(place, folder)
    least, enough, most = (model.explain(TEXT, max_steps=steps) for steps in (16, 1024, 2048))
    assert least.steps == 16 and not least.is_complete and least.completeness_error > 0.02
    check(enough)
    assert most == enough and 16 < enough.steps < 1024


def test_a_network_that_changes_its_tensors_in_place_is_explained(place: Workplace) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1}
    folder = save(place.folder / "kind-resnet", "ResNet", **sizes)
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    grey = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5], "image_std": [0.5], **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(grey))
    path = place.folder / "wide.png"
    picture("daisy", 1, side=40).resize((80, 40)).save(path)
    found = uploaded(place, folder).explain(path)
    check(found)
    regions = found.regions
    assert regions is not None and (regions.rows, regions.columns) == (14, 14)
    assert (regions.left, regions.top, regions.right, regions.bottom) == (24, 4, 56, 36)
    with Image.open(path) as whole:
        drawn = place.folder / "drawn.png"
        drawn.write_bytes(found.overlay(path))
        before, after = whole.convert("RGB"), Image.open(drawn)
    assert before.crop((0, 0, 24, 40)).tobytes() == after.crop((0, 0, 24, 40)).tobytes()
    assert before.crop((24, 4, 56, 36)).tobytes() != after.crop((24, 4, 56, 36)).tobytes()


def test_items_in_the_middle_of_others_are_compared_with_the_mask(place: Workplace) -> None:
    items = ("bread", "butter", "tea")
    folder = place.folder / "kind-masked"
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, "vocab_size": 5}, intermediate_size=32, initializer_range=0.5)
    transformers.BertForMaskedLM(config).eval().save_pretrained(folder)
    (folder / "items.json").write_text(json.dumps({"format": 1, "max_history": 8, "mask": 4, "items": items}))
    (folder / "shardyard.json").write_text(json.dumps({"format": 1, "task": "masked_item"}))
    found = uploaded(place, folder).explain(shardyard.Items(["tea", "bread", "tea"]), target="butter")
    check(found)
    assert "mask" in found.baseline and [each.unread for each in found.attributions] == [False] * 3


def test_a_passage_is_explained_by_query_and_passage(place: Workplace) -> None:
    folder = save_folder(place.folder / "kind-passages", "BertForSequenceClassification", num_labels=1)
    (folder / "shardyard.json").write_text(json.dumps({"format": 1, "task": "reranking", "max_length": 32}))
    found = uploaded(place, folder).explain(("the dog", "a cute dog sleeps"))
    check(found)
    assert {each.part for each in found.attributions} == {"text", "text_pair"}
    assert found.prediction.value == pytest.approx(torch.tensor(found.output).sigmoid().item(), abs=1e-5)
