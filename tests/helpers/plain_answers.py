"""Fine-tuning on SQuAD's JSON the way transformers' own examples do, scored as SQuAD's script does: nothing of ours."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, get_linear_schedule_with_warmup

Row = dict[str, Any]
_LONGEST, _BEST = 30, 20


def rows_of(articles: Sequence[Row]) -> list[Row]:
    """Questions with their contexts and answers."""
    return [
        {"question": question["question"], "context": paragraph["context"], "answers": question["answers"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def train_and_answer(
    model: Path, train: list[Row], held_out: list[Row], *, epochs: int, learning_rate: float, batch: int,
    length: int, overlap: int, seed: int,
) -> list[str]:  # fmt: skip
    """The answers to `held_out`, by a model that was trained on `train`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForQuestionAnswering.from_pretrained(model, dtype=torch.float32)
    windows = [window for row in train for window in _labelled(tokenizer, row, length, overlap)]

    def collate(rows):  # type: ignore[no-untyped-def]
        labels = {name: torch.tensor([row.pop(name) for row in rows]) for name in ("start_positions", "end_positions")}
        return tokenizer.pad(rows, return_tensors="pt") | labels

    loader = torch.utils.data.DataLoader(
        windows, batch_size=batch, shuffle=True, collate_fn=lambda rows: collate([dict(row) for row in rows])
    )
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
    net.eval()
    return [_answer(net, tokenizer, row, length, overlap) for row in held_out]


def scores(answers: Sequence[str], rows: Sequence[Row]) -> tuple[float, float]:
    """Exact match and F1, the functions of evaluate-v1.1.py."""
    exact = f1 = 0.0
    for answer, row in zip(answers, rows, strict=True):
        golds = [each["text"] for each in row["answers"]]
        exact += max(_normalized(answer) == _normalized(gold) for gold in golds)
        f1 += max(_f1(answer, gold) for gold in golds)
    return exact / len(rows), f1 / len(rows)


def _cut(tokenizer, row, length, overlap):  # type: ignore[no-untyped-def]
    return tokenizer(
        row["question"].lstrip(),
        row["context"],
        truncation="only_second",
        max_length=length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _labelled(tokenizer, row, length, overlap):  # type: ignore[no-untyped-def]
    cut = _cut(tokenizer, row, length, overlap)
    begin = row["answers"][0]["answer_start"]
    stop = begin + len(row["answers"][0]["text"])
    for at, ids in enumerate(cut["input_ids"]):
        places = [place for place, part in enumerate(cut.sequence_ids(at)) if part == 1]
        offsets = cut["offset_mapping"][at]
        start = end = 0
        if offsets[places[0]][0] <= begin and offsets[places[-1]][1] >= stop:
            start = max(place for place in places if offsets[place][0] <= begin)
            end = min(place for place in places if offsets[place][1] >= stop)
        inputs = {name: cut[name][at] for name in tokenizer.model_input_names}
        yield {**inputs, "input_ids": ids, "start_positions": start, "end_positions": end}


@torch.inference_mode()
def _answer(net, tokenizer, row, length, overlap):  # type: ignore[no-untyped-def]
    cut = _cut(tokenizer, row, length, overlap)
    found = []
    for at in range(len(cut["input_ids"])):
        outputs = net(**{name: torch.tensor([cut[name][at]]) for name in tokenizer.model_input_names})
        parts, offsets = cut.sequence_ids(at), cut["offset_mapping"][at]
        best = [
            each[0].argsort(descending=True)[:_BEST].tolist() for each in (outputs.start_logits, outputs.end_logits)
        ]
        for start in best[0]:
            for end in best[1]:
                if parts[start] == parts[end] == 1 and 0 <= end - start < _LONGEST:
                    score = float(outputs.start_logits[0, start] + outputs.end_logits[0, end])
                    found.append((score, row["context"][offsets[start][0] : offsets[end][1]]))
    return max(found)[1] if found else ""


def _normalized(text: str) -> str:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _f1(answer: str, gold: str) -> float:
    ours, theirs = _normalized(answer).split(), _normalized(gold).split()
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0
