"""What `bench/trainer.py` trains: the data, the model and the spec of each kind, on the material of the quickstart."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardyard.v1 import spec_pb2
from workload import Workload

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "quickstart"))
GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 256}
VIT = {
    "image_size": 96, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 768, "hidden_act": "gelu_new",
}  # fmt: skip
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 1_024, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.1}
PICTURES, SIDE = 1_000, 200


@dataclass(frozen=True)
class Kind:
    """One kind of training. `prepare` makes its workload of the one that all have; `fill` fills in task, model, data.

    `counts` is what its speed counts; `grouped`: texts of varying length, so that the Trainer can sort by length, too.
    """

    what: str
    counts: str
    grouped: bool
    prepare: Callable[[Workload], Workload]
    fill: Callable[[spec_pb2.JobSpec, Workload], None]


def start(folder: Path, *, threads: int) -> Workload:
    """The pretrained BERT, and the reviews of the quickstart."""
    import assets
    import material

    data = material.reviews(assets.snippets_folder(), folder / "reviews")
    return Workload(
        folder=folder,
        text=data.unlabelled,
        labelled=data.all,
        model=assets.bert_folder(),
        tokenizer=folder / "tokenizer" / "tokenizer.json",
        sequence_length=64,
        batch_size=32,
        learning_rate=1e-4,
        threads=threads,
    )


def gpt2(workload: Workload) -> Workload:
    """A byte-level BPE, the same for every side."""
    from tokenizers import ByteLevelBPETokenizer

    target = workload.tokenizer
    target.parent.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(workload.text)], vocab_size=16_384, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(target))
    # A bare tokenizer.json does not say which of its tokens ends a text.
    (target.parent / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}\n', encoding="utf-8")
    return replace(workload, sequence_length=256, batch_size=8, learning_rate=1e-3, overrides=GPT2)


def fill_gpt2(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """Pretraining from nothing."""
    spec.pretraining.causal_lm.sequence_length = workload.sequence_length
    spec.model.architecture.model_type = "gpt2"
    spec.model.architecture.overrides.update({**workload.overrides, "n_positions": workload.sequence_length})
    spec.tokenizer.uri = str(workload.tokenizer.parent)
    spec.train_data.uri = str(workload.text)
    spec.train_data.format = spec_pb2.DATA_FORMAT_TEXT


def fill_bert(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """Classification of texts of varying length."""
    spec.fine_tuning.text_classification.max_length = workload.sequence_length
    spec.fine_tuning.text_classification.pooling = spec_pb2.POOLING_CLS
    spec.model.uri = str(workload.model)
    spec.train_data.uri = str(workload.labelled)


def ner(workload: Workload) -> Workload:
    """The labelled addresses of `make quickstart TASK=ner`."""
    from stories import ner

    return replace(workload, data=ner.prepare(workload.folder / "addresses").train_file)


def fill_ner(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """Tags of words."""
    spec.fine_tuning.token_classification.max_length = workload.sequence_length
    spec.model.uri = str(workload.model)
    spec.train_data.uri = str(workload.data)


def questions(workload: Workload) -> Workload:
    """Which house number belongs to a street, in a context of one to eight of the labelled addresses."""
    from stories import ner

    addresses = ner.prepare(workload.folder / "addresses").train
    drawn, rows = random.Random(0), []
    for address in addresses:
        parts = {tag[2:]: word.rstrip(",") for word, tag in zip(*address, strict=True)}
        if not {"AddressNumber", "StreetName"} <= parts.keys():
            continue
        others = [" ".join(words) for words, _ in drawn.choices(addresses, k=drawn.randrange(8))]
        texts = [*others, " ".join(address[0])]
        drawn.shuffle(texts)
        context = "; ".join(texts)
        at = context.index(parts["AddressNumber"], context.index(" ".join(address[0])))
        answers = {"text": [parts["AddressNumber"]], "answer_start": [at]}
        rows.append({"question": f"Which number in {parts['StreetName']}?", "context": context, "answers": answers})
    return replace(workload, data=write_rows(workload.folder / "questions.jsonl", rows), sequence_length=160)


def fill_questions(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """The span of an answer."""
    spec.fine_tuning.question_answering.max_length = workload.sequence_length
    spec.fine_tuning.question_answering.overlap = workload.sequence_length // 4
    spec.model.uri = str(workload.model)
    spec.train_data.uri = str(workload.data)


def sequences(workload: Workload) -> Workload:
    """The labelled addresses into their parts by name, with a byte-level BPE, the same for every side."""
    from stories import ner
    from tokenizers import ByteLevelBPETokenizer

    addresses = ner.prepare(workload.folder / "addresses").train
    pairs = [
        (" ".join(words), " ".join(f"{tag[2:]}: {word}" for word, tag in zip(words, tags, strict=True)))
        for words, tags in addresses
    ]
    workload.tokenizer.parent.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    texts = [text for pair in pairs for text in pair]
    tokenizer.train_from_iterator(texts, vocab_size=4_096, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer.save(str(workload.tokenizer))
    settings = {"pad_token": "<pad>", "eos_token": "</s>"}
    (workload.tokenizer.parent / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    rows = [{"source": source, "target": target} for source, target in pairs]
    return replace(
        workload,
        data=write_rows(workload.folder / "pairs.jsonl", rows),
        sequence_length=96,
        learning_rate=1e-3,
        overrides=T5,
    )


def fill_sequences(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """A T5 from nothing."""
    task = spec.fine_tuning.translation
    task.source_language, task.target_language = "en", "de"
    task.max_source_length = task.max_target_length = workload.sequence_length
    spec.model.architecture.model_type = "t5"
    spec.model.architecture.overrides.update(workload.overrides)
    spec.tokenizer.uri = str(workload.tokenizer.parent)
    spec.train_data.uri = str(workload.data)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSONL, a line each."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def images(workload: Workload) -> Workload:
    """JPEG files: cuttings of the two photographs that come with scikit-learn; which of them, is the class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    drawn = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        folder = workload.folder / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(PICTURES // 2):
            top, left = (int(drawn.integers(size - SIDE)) for size in photograph.shape[:2])
            Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(folder / f"{number:04}.jpg")
    return replace(workload, data=workload.folder / "pictures", overrides=VIT, learning_rate=1e-3)


def fill_images(spec: spec_pb2.JobSpec, workload: Workload) -> None:
    """Classes of pictures, without augmentation."""
    spec.fine_tuning.image_classification.image_size = VIT["image_size"]
    spec.fine_tuning.image_classification.crop_scale = 1.0
    spec.fine_tuning.image_classification.flip = 0.0
    spec.model.architecture.model_type = "vit"
    spec.model.architecture.overrides.update(workload.overrides)
    spec.train_data.uri = str(workload.data)


KINDS: Mapping[str, Kind] = {
    "gpt2": Kind("GPT-2 pretraining", "tokens", False, gpt2, fill_gpt2),
    "bert": Kind("BERT fine-tuning", "tokens", True, lambda workload: workload, fill_bert),
    "ner": Kind("BERT on tagged words", "tokens", True, ner, fill_ner),
    "questions": Kind("BERT on questions", "tokens", True, questions, fill_questions),
    "seq2seq": Kind("T5 from pairs of texts", "tokens", True, sequences, fill_sequences),
    "images": Kind("ViT on JPEG files", "pictures", False, images, fill_images),
}
