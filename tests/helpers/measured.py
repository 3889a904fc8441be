"""Small models with data of every kind, and a reporter that keeps what an evaluation says."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from helpers.chat_folders import CHATML
from helpers.small_pictures import write_folders
from helpers.tiny_folders import WORDS, save_folder
from shardyard.v1 import job_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.training.report import PrintingReporter

TAGS = ["O", "B-PER", "B-LOC"]

TRAINED: dict[str, dict[str, Any]] = {
    "text_classification": {
        "fine_tuning": {"text_classification": {"max_length": 12, "pooling": "POOLING_MEAN"}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": "ROOT/train.csv"},
        "eval_data": {"uri": "ROOT/new.csv"},
    },
    "token_classification": {
        "fine_tuning": {"token_classification": {"max_length": 8, "overlap": 2}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": "ROOT/train.jsonl"},
        "eval_data": {"uri": "ROOT/new.jsonl"},
    },
    "question_answering": {
        "fine_tuning": {"question_answering": {"max_length": 20, "overlap": 4, "max_answer_length": 5}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": "ROOT/train_questions.jsonl"},
        "eval_data": {"uri": "ROOT/new_questions.jsonl"},
    },
    "reranking": {
        "fine_tuning": {"reranking": {"max_length": 12}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": "ROOT/train_passages.jsonl"},
        "eval_data": {"uri": "ROOT/new_passages.jsonl"},
    },
    "image_classification": {
        "fine_tuning": {"image_classification": {"image_size": 24, "flip": 0.5}},
        "model": {"architecture": {"model_type": "resnet", "overrides": {
            "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}}},
        "train_data": {"uri": "ROOT/pictures"},
        "eval_data": {"uri": "ROOT/new_pictures"},
    },
    "recommendation": {
        "fine_tuning": {"recommendation": {"max_history": 6, "min_item_interactions": 3, "exclude_seen": False}},
        "model": {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 1, "n_head": 2, "n_embd": 16}}},
        "train_data": {"uri": "ROOT/histories.csv"},
    },
    "recommendation_of_two": {
        "fine_tuning": {"recommendation": {"max_history": 6, "split": "SPLIT_LEAVE_TWO_OUT"}},
        "model": {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 1, "n_head": 2, "n_embd": 16}}},
        "train_data": {"uri": "ROOT/histories.csv"},
    },
    "recommendation_by_time": {
        "fine_tuning": {"recommendation": {"max_history": 6, "split": "SPLIT_TIME"}},
        "model": {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 1, "n_head": 2, "n_embd": 16}}},
        "train_data": {"uri": "ROOT/timed.csv"},
        "evaluation": {"holdout": 0.3},
    },
    "masked_item": {
        "pretraining": {"masked_item": {"max_history": 6, "mask_probability": 0.5, "min_item_interactions": 2}},
        "model": {"architecture": {"model_type": "bert", "overrides": {
            "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}}},
        "train_data": {"uri": "ROOT/histories.csv"},
    },
    "translation": {
        "fine_tuning": {"translation": {
            "max_source_length": 24, "max_target_length": 12, "source_prefix": "say ", "num_beams": 2}},
        "model": {"architecture": {"model_type": "t5", "overrides": {
            "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}}},
        "tokenizer": {"train": {"vocab_size": 280}},
        "train_data": {"uri": "ROOT/train_pairs.jsonl"},
        "eval_data": {"uri": "ROOT/new_pairs.jsonl"},
    },
    "instruction": {
        "fine_tuning": {"instruction": {"max_length": 150, "chat_template": CHATML, "last_turn_only": True}},
        "model": {"uri": "ROOT/chatter"},
        "train_data": {"uri": "ROOT/train_chats.jsonl"},
        "eval_data": {"uri": "ROOT/new_chats.jsonl"},
    },
    "causal_lm": {
        "pretraining": {"causal_lm": {"sequence_length": 24}},
        "model": {"uri": "ROOT/gpt2"},
        "train_data": {"uri": "ROOT/train.txt"},
        "eval_data": {"uri": "ROOT/new.txt"},
    },
    "masked_lm": {
        "pretraining": {"masked_lm": {"sequence_length": 24, "mask_probability": 0.4, "whole_word": True}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": "ROOT/train.txt"},
        "eval_data": {"uri": "ROOT/new.txt"},
        "optimization": {"seed": 7},
    },
}  # fmt: skip
"""A training of each task, on what `write_measured` writes into ROOT; items by time with a share of their own."""


class Recorder(PrintingReporter):
    """Keeps the events; a directive to stop comes when so many progress events have come."""

    def __init__(self, *, stop_after: int = 10**9) -> None:
        super().__init__(io.StringIO())
        self.events: list[worker_pb2.WorkerEvent] = []
        self._left = stop_after

    def emit(self, event: worker_pb2.WorkerEvent, *, durable: bool = False) -> None:
        self.events.append(event)
        self._left -= event.HasField("progress")
        if self._left <= 0:
            self.directive = worker_pb2.Directive(action=worker_pb2.Directive.ACTION_STOP, reason="CANCELLED")

    def kinds(self) -> list[str]:
        return [event.WhichOneof("payload") or "" for event in self.events]

    def evaluation(self) -> job_pb2.Evaluation:
        (found,) = [event.evaluation for event in self.events if event.HasField("evaluation")]
        return found


def write_measured(folder: Path) -> None:
    """Writes data to train on and new data for each kind of task, and models without a head of theirs."""
    draw = random.Random(3)
    for name, number in (("train", 40), ("new", 23)):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(number)]
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
        rows = [f"{text.replace(',', 'a')},{draw.choice(['good', 'bad'])}" for text in texts]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        tagged = [{"tokens": text.split(), "tags": draw.choices(TAGS, k=len(text.split()))} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
        asked = [question_about(at, text, draw) for at, text in enumerate(texts)]
        (folder / f"{name}_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        pairs = [{"source": text, "target": text[::-1]} for text in texts[:6]]
        (folder / f"{name}_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        passages = [{"query": text.split()[0], "positives": text, "negatives": texts[:3]} for text in texts[3:9]]
        (folder / f"{name}_passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
        chats = [{"messages": turns(text.split()[:2], text.split()[1:3])} for text in texts[:6]]
        (folder / f"{name}_chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    rows = [f"u{user},i{int(40 * draw.random() ** 2)}" for user in range(60) for _ in range(draw.randint(3, 9))]
    (folder / "histories.csv").write_text("user,item\n" + "\n".join(rows) + "\n")
    timed = [f"{row},{1_700_000_000 + 3600 * draw.randrange(500)}" for row in rows]
    (folder / "timed.csv").write_text("user,item,time\n" + "\n".join(timed) + "\n")
    write_folders(folder / "pictures", 6)
    write_folders(folder / "new_pictures", 3, first=50)
    save_folder(folder / "bert", "BertForMaskedLM")
    save_folder(folder / "bare", "BertModel")
    save_folder(folder / "gpt2", "GPT2LMHeadModel")
    save_folder(folder / "chatter", "GPT2LMHeadModel", n_positions=160)


def turns(*said: list[str]) -> list[dict[str, str]]:
    """A conversation with an answer to each question."""
    return [
        {"role": role, "content": word}
        for words in said
        for role, word in zip(("user", "assistant"), words, strict=True)
    ]


def question_about(at: int, text: str, draw: random.Random) -> dict[str, Any]:
    """A question whose answer is a word of the text."""
    word = draw.choice(text.split())
    answers = {"text": [word], "answer_start": [text.index(word)]}
    return {"id": str(at), "question": "is the dog", "context": text, "answers": answers}
