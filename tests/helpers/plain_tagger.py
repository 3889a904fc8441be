"""Fine-tuning a tagger the way transformers' own examples do, and entities by the rules of CoNLL: nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    get_linear_schedule_with_warmup,
)

Sentences = list[tuple[list[str], list[str]]]
_LENGTH = 128


def read_conll(path: Path) -> Sentences:
    """Sentences of `word tag` lines, with a B- at the beginning of every entity."""
    sentences: Sentences = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split() for line in block.splitlines() if line.strip()]
        if not rows:
            continue
        tags: list[str] = []
        for at, (_, tag) in enumerate(rows):
            before = rows[at - 1][1] if at else "O"
            opens = tag != "O" and (tag[0] == "B" or before[2:] != tag[2:])
            tags.append(f"{'B' if opens else 'I'}-{tag[2:]}" if tag != "O" else "O")
        sentences.append(([word for word, _ in rows], tags))
    return sentences


def train_and_tag(
    model: Path, train: Sentences, held_out: Sentences, *, epochs: int, learning_rate: float, batch: int, seed: int
) -> list[list[str]]:
    """The tags of the words of `held_out`, by a model that was trained on `train`."""
    torch.manual_seed(seed)
    labels = sorted({tag for _, tags in train for tag in tags})
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = dict(enumerate(labels))
    net = AutoModelForTokenClassification.from_pretrained(
        model, num_labels=len(labels), id2label=names, dtype=torch.float32
    )
    data = [_encode(tokenizer, words, [labels.index(tag) for tag in tags]) for words, tags in train]
    collate = DataCollatorForTokenClassification(tokenizer)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True, collate_fn=collate)
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    net.train()
    for _ in range(epochs):
        for inputs in loader:
            net(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return [_tag(net.eval(), tokenizer, words, labels) for words, _ in held_out]


def entity_f1(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 of entities whose kind and words are all right."""
    wanted = {(at, *entity) for at, tags in enumerate(truth) for entity in _entities(tags)}
    given = {(at, *entity) for at, tags in enumerate(found) for entity in _entities(tags)}
    return 2 * len(wanted & given) / max(len(wanted) + len(given), 1)


def _encode(tokenizer, words, classes):  # type: ignore[no-untyped-def]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=_LENGTH)
    of = encoded.word_ids()
    firsts = [word is not None and word != before for word, before in zip(of, [None, *of], strict=False)]
    encoded["labels"] = [classes[word] if first else -100 for word, first in zip(of, firsts, strict=True)]
    return encoded


@torch.inference_mode()
def _tag(net, tokenizer, words, labels):  # type: ignore[no-untyped-def]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
    answers = net(**encoded).logits[0].argmax(-1).tolist()
    tags = ["O"] * len(words)
    for place, word in reversed(list(enumerate(encoded.word_ids()))):
        if word is not None:
            tags[word] = labels[answers[place]]
    return tags


def _entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for at, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = at + 1
            while end < len(tags) and tags[end] == f"I-{tag[2:]}":
                end += 1
            found.append((tag[2:], at, end))
    return found
