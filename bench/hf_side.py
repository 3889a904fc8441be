"""The Hugging Face `Trainer` as one side of `bench/trainer.py`: as its documentation uses it, streaming nothing.

python bench/hf_side.py gpt2|bert|ner|questions|seq2seq|images WORKLOAD.json [group_by_length]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from gate import Gate
from workload import Workload, few_reviews, json_rows, pictures, tagged_words, token_blocks


class CountingCollator:
    """Collates with the given collator, and counts the real tokens (of sources and targets), or the pictures."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self.tokens = 0

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """The batch of these features."""
        batch = self._collate(features)
        mask = batch.get("attention_mask")
        whole = batch["input_ids"].numel() if "input_ids" in batch else len(batch["labels"])
        self.tokens += int(whole if mask is None else mask.sum())
        if isinstance(self._collate, DataCollatorForSeq2Seq):
            self.tokens += int((batch["labels"] != -100).sum())
        return batch


class Blocks(torch.utils.data.Dataset[dict[str, Any]]):
    """Blocks of tokens, as `run_clm` makes them."""

    def __init__(self, blocks: list[list[int]]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}


def main(kind: str, workload: Workload, *, grouped: bool) -> None:
    """Train until the bench has had enough."""
    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    gate = Gate(count=lambda: counting.tokens)
    model, data, collate, tokenizer = SIDES[kind](workload)
    counting = CountingCollator(collate)
    arguments = TrainingArguments(
        output_dir=str(workload.folder / "hf"),
        per_device_train_batch_size=workload.batch_size,
        max_steps=1_000_000,
        learning_rate=workload.learning_rate,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=counting, processing_class=tokenizer
    )
    gate.install()
    trainer.train()


def gpt2(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """The stock GPT-2 and blocks of tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(workload.tokenizer), eos_token="<|endoftext|>")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=workload.sequence_length, **workload.overrides)
    blocks = token_blocks(tokenizer, workload)
    return GPT2LMHeadModel(config), Blocks(blocks), stack, tokenizer


def bert(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """The pretrained BERT with a classification head, and texts of varying length."""
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    model = AutoModelForSequenceClassification.from_pretrained(workload.model, num_labels=2, dtype=torch.float32)
    tokenizer.backend_tokenizer.no_padding()
    texts, labels = few_reviews(workload)
    encoded = tokenizer(texts, truncation=True, max_length=workload.sequence_length)
    data = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(encoded["input_ids"], labels, strict=True)
    ]
    return model, data, DataCollatorWithPadding(tokenizer), tokenizer


def ner(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """The pretrained BERT with a head for tags; the first piece of a word is learnt."""
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    tokenizer.backend_tokenizer.no_padding()
    texts = tagged_words(workload)
    tags = sorted({tag for _, found in texts for tag in found})
    model = AutoModelForTokenClassification.from_pretrained(workload.model, num_labels=len(tags), dtype=torch.float32)
    data = []
    for words, found in texts:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=workload.sequence_length)
        places = encoded.word_ids()
        before = [None, *places[:-1]]
        labels = [
            -100 if place is None or place == last else tags.index(found[place])
            for place, last in zip(places, before, strict=True)
        ]
        ids = encoded["input_ids"]
        data.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return model, data, DataCollatorForTokenClassification(tokenizer), tokenizer


def questions(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """The pretrained BERT with a head for spans; contexts in overlapping windows, as `run_qa` makes them."""
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    tokenizer.backend_tokenizer.no_padding()
    model = AutoModelForQuestionAnswering.from_pretrained(workload.model, dtype=torch.float32)
    rows = json_rows(workload)
    encoded = tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=workload.sequence_length,
        stride=workload.sequence_length // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    data = []
    for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
        answers = rows[row]["answers"]
        start, text = answers["answer_start"][0], answers["text"][0]
        tokens = [
            place
            for place, (part, (begin, end)) in enumerate(
                zip(encoded.sequence_ids(window), encoded["offset_mapping"][window], strict=True)
            )
            if part == 1 and begin < start + len(text) and end > start
        ]
        first, last = (tokens[0], tokens[-1]) if tokens else (0, 0)
        names = ("input_ids", "token_type_ids", "attention_mask")
        features = {name: encoded[name][window] for name in names}
        data.append({**features, "start_positions": first, "end_positions": last})
    return model, data, DataCollatorWithPadding(tokenizer), tokenizer


def seq2seq(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """A T5 from nothing, and pairs of texts."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(workload.tokenizer), pad_token="<pad>", eos_token="</s>")
    config = T5Config(
        **workload.overrides,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    limits = {"truncation": True, "max_length": workload.sequence_length - 1}
    data = []
    for row in json_rows(workload):
        source = tokenizer(row["source"], **limits)["input_ids"]
        target = tokenizer(row["target"], **limits)["input_ids"]
        labels = [*target, tokenizer.eos_token_id]
        data.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": labels})
    return model, data, DataCollatorForSeq2Seq(tokenizer, model=model), tokenizer


class Files(torch.utils.data.Dataset[dict[str, Any]]):
    """Pictures from files, decoded and scaled when they are asked for."""

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self._files, self._size = files, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self._files[index]
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((self._size, self._size), Image.Resampling.BILINEAR))
        return {
            "pixel_values": torch.from_numpy((pixels.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32)),
            "labels": label,
        }


def images(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """A ViT from nothing on picture files."""
    files = pictures(workload)
    model = ViTForImageClassification(ViTConfig(**workload.overrides, num_labels=2))
    return model, Files(files, workload.overrides["image_size"]), default_data_collator, None


def stack(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks of one length as tensors."""
    return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}


SIDES = {"gpt2": gpt2, "bert": bert, "ner": ner, "questions": questions, "seq2seq": seq2seq, "images": images}


if __name__ == "__main__":
    main(
        sys.argv[1],
        Workload.from_dict(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))),
        grouped="group_by_length" in sys.argv[3:],
    )
