"""Explanations through the service: which words, regions of a picture and items an answer comes from."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
import transformers
from PIL import Image

import shardyard
from helpers.small_pictures import picture, save_vit
from helpers.tiny_folders import WORDS, save_folder
from helpers.workplace import Workplace
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import model_service_pb2_grpc

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


def test_first(models, place):
    for name, item in {"texts": TEXT, "tags": TEXT, "questions": ("the dog ?", TEXT), "pictures": Path(place.folder / "p.png"), "items": shardyard.Items(["bread", "tea", "nope"]), "number": TEXT, "bytes": TEXT}.items():
        picture("rose", 1).save(place.folder / "p.png")
        print(name, models[name].info.inputs, models[name].explain(item))
    assert 0
