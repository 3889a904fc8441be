"""Data and specs of texts whose vectors are learnt, and their loss as anyone would write it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.plan_requests import ask
from helpers.small_specs import sentences
from shardyard_trainer.tasks.module import ModuleOutput

KINDS = ("pairs", "triplets", "scored")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PAIR = {"anchor": "the dog runs", "positive": "a cute dog"}
SCORED = {"text": "the dog runs", "text_pair": "a cute dog", "score": 0.5}


def rows_of(kind: str, number: int = 60) -> list[dict[str, Any]]:
    """Texts and their reverse; every third anchor is there twice, with another positive. `several`: three negatives."""
    found: list[dict[str, Any]] = []
    texts = sentences(number + 1)
    for at, text in enumerate(texts[:number]):
        anchor, positive = texts[at - at % 3 // 2], " ".join(reversed(text.split()))
        if kind == "scored":
            found.append({"text": anchor, "text_pair": positive, "score": at % 6})
        else:
            negative = {"negative": texts[at + 1][::-1]} if kind == "triplets" else {}
            negative = {f"negative_{n}": f"{n} {text[::-1]}" for n in (1, 2, 3)} if kind == "several" else negative
            found.append({"anchor": anchor, "positive": positive, **negative})
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def embedding(root: Path, rows: list[dict[str, Any]], settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A spec, with its rows in a file of its own."""
    path = write_rows(root / f"rows-{abs(hash(json.dumps(rows)))}.jsonl", rows)
    spec: dict[str, Any] = {
        "fine_tuning": {"sentence_embedding": settings or {}},
        "model": {"uri": "ROOT/bert"},
        "train_data": {"uri": str(path)},
        "optimization": {"max_steps": 10},
    }
    return spec | changes


def said(root: Path, spec: dict[str, Any]) -> str:
    """The violations of a plan, one a line: field, message."""
    return "\n".join(f"{each.field}: {each.message}" for each in ask(root, spec).violations)


def settings_of(kind: str) -> dict[str, Any]:
    """A task's settings, as JSON."""
    return {"maxLength": 12, **({"lowestScore": 0, "highestScore": 5} if kind == "scored" else {"temperature": 0.1})}


def fresh_bert(data: Path, kind: str, *, dropout: float = 0.0) -> dict[str, Any]:
    """The spec of a tiny model from scratch, as JSON."""
    return {
        "fineTuning": {"sentenceEmbedding": settings_of(kind)},
        "model": {"architecture": {"modelType": "bert", "overrides": TINY}, "dropout": dropout},
        "tokenizer": {"train": {"vocabSize": 120, "algorithm": "ALGORITHM_WORDPIECE"}},
        "trainData": {"uri": str(data)},
    }


class PlainEmbedder(nn.Module):
    """The loss of a whole batch by hand: a loop over anchors, with mean pooling and a temperature of 0.1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, keys: torch.Tensor, cosines: torch.Tensor | None = None, **inputs: torch.Tensor) -> ModuleOutput:
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors = (pooled / pooled.norm(dim=-1, keepdim=True)).reshape(*keys.shape, -1)
        if cosines is not None:
            return ModuleOutput(((vectors[:, 0] * vectors[:, 1]).sum(-1) - cosines).square().sum(), None)
        losses = []
        for one, anchor in enumerate(keys[:, 0].tolist()):
            mine = {int(each[1]) for each in keys if int(each[0]) == anchor} | {anchor}
            right = torch.exp(vectors[one, 0] @ vectors[one, 1] / 0.1)
            wrong = [
                torch.exp(vectors[one, 0] @ vectors[other, text] / 0.1)
                for other in range(len(keys))
                for text in range(1, keys.shape[1])
                if int(keys[other, text]) not in mine
            ]
            losses.append(-torch.log(right / (right + sum(wrong))))
        return ModuleOutput(torch.stack(losses).sum(), None)
