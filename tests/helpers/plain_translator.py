"""Training an encoder-decoder the way transformers' own examples do, from random weights: nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_linear_schedule_with_warmup,
)

Pairs = Sequence[tuple[str, str]]


def train_and_write(
    folder: Path, train: Pairs, sources: Sequence[str], *, length: int, budget: Mapping[str, Any]
) -> list[str]:
    """What a model of the configuration and tokenizer of `folder`, trained on `train`, writes for `sources`."""
    torch.manual_seed(budget["seed"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(folder))
    data = []
    for source, target in train:
        encoded = tokenizer(source, truncation=True, max_length=length)
        labels = tokenizer(text_target=target, truncation=True, max_length=length)["input_ids"]
        data.append({"input_ids": encoded["input_ids"], "labels": labels})
    collate = DataCollatorForSeq2Seq(tokenizer, model=net)
    loader = torch.utils.data.DataLoader(data, batch_size=budget["global_batch_size"], shuffle=True, collate_fn=collate)
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=budget["learning_rate"])
    steps = budget["epochs"] * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    net.train()
    for _ in range(budget["epochs"]):
        for inputs in loader:
            net(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return _write(net.eval(), tokenizer, sources, length)


@torch.inference_mode()
def _write(net: Any, tokenizer: Any, sources: Sequence[str], length: int) -> list[str]:
    texts: list[str] = []
    for first in range(0, len(sources), 32):
        inputs = tokenizer(
            list(sources[first : first + 32]), truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        rows = net.generate(**inputs, max_new_tokens=length)
        texts += [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return texts
