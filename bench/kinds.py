"""What `bench/trainer.py` trains: the data, the model and the spec of each kind, on the material of the quickstart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardyard.v1 import spec_pb2
from workload import Workload

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "quickstart"))
GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 256}
VIT = {
    "image_size": 96, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 768, "hidden_act": "gelu_new",
}  # fmt: skip
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
    "images": Kind("ViT on JPEG files", "pictures", False, images, fill_images),
}
