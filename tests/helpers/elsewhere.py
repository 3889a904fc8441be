"""A job for each task, and how the code of its model's card shows what `Predict` answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shardyard
from helpers.chats import write_chats
from helpers.pair_specs import TINY, TINY_BART, filled_with_pairs
from helpers.questions import asked as questions
from helpers.small_pictures import picture, save_vit, write_folders
from helpers.tagged import TEXTS, write_lines
from helpers.tiny_folders import WORDS

TEXT = "Hello, my dog is cute"
BERT = shardyard.Architecture(
    "bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
)
GPT2 = shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16})
T5 = shardyard.Architecture("t5", TINY)
BART = shardyard.Architecture("bart", TINY_BART)
PIECES = shardyard.TrainedTokenizer(algorithm="wordpiece", vocab_size=300)
BYTES = shardyard.TrainedTokenizer(algorithm="byte_bpe", vocab_size=300)
MASKED = "Hello, my dog is [MASK]"
SPANS = "Hello, my <extra_id_0> is cute"

Shown = list[float] | list[str]


@dataclass(frozen=True)
class Case:
    """A task's job on data that `write` has made, and two ways to an answer: the model's, and what `code` prints.

    `code` follows the lines of the card, and prints the answer as JSON in its last line.
    """

    task: Any
    data: str
    answer: Callable[[shardyard.Model, Path], Shown]
    code: str
    settings: Mapping[str, Any]


def write(folder: Path) -> None:
    """The data and models that `CASES` name, beside those of a workplace."""
    filled_with_pairs(folder)
    write_lines(folder / "tagged.jsonl", [{"tokens": words, "tags": tags} for words, tags in TEXTS])
    write_lines(folder / "questions.jsonl", questions(40, 1))
    write_chats(folder / "chats.jsonl")
    write_folders(folder / "pictures", 6)
    save_vit(folder / "vit")
    rows = [f"u{user},i{(user + time) % 20},{1_700_000_000 + time}" for user in range(30) for time in range(6)]
    pairs = [
        {"anchor": f"{one} {other}", "positive": f"{other} {one} {one}"}
        for one, other in itertools.permutations(WORDS[:8], 2)
    ]
    write_lines(folder / "sentences.jsonl", pairs)
    choices = [{"prompt": "Who are you?", "chosen": f"model {at}", "rejected": f"dog {at}"} for at in range(40)]
    write_lines(folder / "choices.jsonl", choices)
    passages = [{"query": f"dog {at % 8}", "passage": f"number {at}", "label": at % 2} for at in range(40)]
    write_lines(folder / "passages.jsonl", passages)
    (folder / "items.csv").write_text("user,item,time\n" + "\n".join(rows) + "\n")


def logits(model: shardyard.Model, folder: Path) -> Shown:
    return list(model.predict([TEXT])[0].logits)


def tags(model: shardyard.Model, folder: Path) -> Shown:
    return [each.score for each in model.predict(["My name is Clara and I live in Berkeley"])[0].tags]


def masks(model: shardyard.Model, folder: Path) -> Shown:
    return [model.predict([MASKED])[0].masks[0][0].score]


def answered(model: shardyard.Model, folder: Path) -> Shown:
    asked = shardyard.Question("Who wrote Faust?", "Goethe wrote Faust in Weimar.")
    return [model.predict([asked])[0].answer.text]


def written(text: str, **parameters: Any) -> Callable[[shardyard.Model, Path], Shown]:
    return lambda model, folder: [model.predict([text], **parameters)[0].text.strip()]


def pictures(model: shardyard.Model, folder: Path) -> Shown:
    picture("violet", 7, side=50).save(folder / "picture.png")
    return list(model.predict([folder / "picture.png"])[0].logits)


def vector(model: shardyard.Model, folder: Path) -> Shown:
    return list(model.embed([TEXT])[0].values)


def relevance(model: shardyard.Model, folder: Path) -> Shown:
    pair = ("How many moons has Mars?", "Mars has two moons, Phobos and Deimos.")
    return list(model.predict([pair])[0].logits)


def places(model: shardyard.Model, folder: Path) -> Shown:
    picture("violet", 7, side=50).save(folder / "picture.png")
    return list(model.embed([folder / "picture.png"], output="last_hidden_state")[0].values)


def ranked(model: shardyard.Model, folder: Path) -> Shown:
    history = json.loads((folder / "items.json").read_text(encoding="utf-8"))["items"][:3]
    return [each.item for each in model.predict([shardyard.Items(history)], top_k=10)[0].items]


LOGITS = "print(json.dumps(logits[0].flatten().tolist()))"
TAGS = (
    "words = tokenizer('My name is Clara and I live in Berkeley').word_ids()\n"
    "first = [at for at, word in enumerate(words) if word is not None and word != words[at - 1]]\n"
    "print(json.dumps([float(logits[0, at].softmax(-1).max()) for at in first]))"
)
MASK = "print(json.dumps([float(logits[0, -2].softmax(-1).max())]))"
CONTINUED = "print(json.dumps([tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()]))"
WRITTEN = "print(json.dumps([tokenizer.decode(written[0], skip_special_tokens=True).strip()]))"
SPOKEN = "print(json.dumps([tokenizer.decode(answer, skip_special_tokens=True).strip()]))"
# The sentinels of missing spans are special tokens, and part of the answer.
SPANNED = (
    "found = tokenizer.decode(written[0]).strip()\n"
    "for mark in ('<pad>', '</s>'): found = found.removeprefix(mark).removesuffix(mark).strip()\n"
    "print(json.dumps([found]))"
)
RANKED = "print(json.dumps([saved['items'][token - 1] for token in best]))"

CASES = {
    "text_classification": Case(
        shardyard.TextClassification(pooling="cls"), "reviews.csv", logits, LOGITS, {"model": "bert"}
    ),
    "text_classification, own head": Case(
        shardyard.TextClassification(pooling="mean"), "reviews.csv", logits, LOGITS, {"model": "bert"}
    ),
    "token_classification": Case(
        shardyard.TokenClassification(max_length=16), "tagged.jsonl", tags, TAGS, {"model": "bert"}
    ),
    "question_answering": Case(
        shardyard.QuestionAnswering(max_length=32, overlap=8),
        "questions.jsonl",
        answered,
        "print(json.dumps([answer]))",
        {"model": "bert"},
    ),
    "masked_lm": Case(
        shardyard.MaskedLm(sequence_length=16), "book.txt", masks, MASK, {"model": BERT, "tokenizer": PIECES}
    ),
    "causal_lm": Case(
        shardyard.CausalLm(sequence_length=32),
        "book.txt",
        written(TEXT, max_new_tokens=10),
        CONTINUED,
        {"model": GPT2, "tokenizer": BYTES},
    ),
    "translation": Case(
        shardyard.Translation(max_source_length=32, max_target_length=32),
        "pairs.jsonl",
        written(TEXT),
        WRITTEN,
        {"model": T5, "tokenizer": BYTES},
    ),
    "summarization": Case(
        shardyard.Summarization(max_source_length=32, max_target_length=16),
        "pairs.jsonl",
        written(TEXT),
        WRITTEN,
        {"model": BART, "tokenizer": PIECES},
    ),
    "span_corruption": Case(
        shardyard.SpanCorruption(sequence_length=32),
        "book.txt",
        written(SPANS),
        SPANNED,
        {"model": T5, "tokenizer": PIECES},
    ),
    "instruction": Case(
        shardyard.Instruction(max_length=64),
        "chats.jsonl",
        written("Hello, who are you?", max_new_tokens=40),
        SPOKEN,
        {"model": "chat"},
    ),
    "preference": Case(
        shardyard.Preference(max_length=64),
        "choices.jsonl",
        written("Hello, who are you?", max_new_tokens=40),
        SPOKEN,
        {"model": "chat"},
    ),
    "sentence_embedding": Case(
        shardyard.SentenceEmbedding(max_length=16), "sentences.jsonl", vector, LOGITS, {"model": "bert"}
    ),
    "reranking": Case(
        shardyard.Reranking(max_length=32), "passages.jsonl", relevance, LOGITS, {"model": "bert"}
    ),
    "image_classification": Case(
        shardyard.ImageClassification(), "pictures", pictures, LOGITS, {"model": "vit"}
    ),
    "masked_image": Case(shardyard.MaskedImage(mask_patch=8), "pictures", places, LOGITS, {"model": "vit"}),
    "recommendation": Case(shardyard.Recommendation(max_history=6), "items.csv", ranked, RANKED, {"model": GPT2}),
    "masked_item": Case(shardyard.MaskedItem(max_history=6), "items.csv", ranked, RANKED, {"model": BERT}),
}  # fmt: skip
