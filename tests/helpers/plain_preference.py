"""Direct preference optimisation the way its paper writes it, with a frozen copy of the model: nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

BETA = 0.1


class Pair(NamedTuple):
    """A prompt with the answer that is preferred, and the other one."""

    prompt: str
    chosen: str
    rejected: str


class Accuracies(NamedTuple):
    """Shares of the held-out pairs whose chosen answer the model found likelier before training, and of those whose
    chosen answer has the higher reward after it."""

    before: float
    after: float


def train_and_compare(
    folder: Path, train: Sequence[Pair], held_out: Sequence[Pair], *, length: int, budget: Mapping[str, Any]
) -> Accuracies:
    """Continues from the model of `folder` on `train`, with its tokenizer and chat template."""
    torch.manual_seed(budget["seed"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder)
    reference = copy.deepcopy(net).requires_grad_(False).eval()
    data = [_encode(tokenizer, pair, length) for pair in train]
    loader = torch.utils.data.DataLoader(data, budget["global_batch_size"], shuffle=True, collate_fn=list)
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=budget["learning_rate"])
    steps = budget["epochs"] * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    net.train()
    for _ in range(budget["epochs"]):
        for pairs in loader:
            gains = _log_probs(net, pairs) - _log_probs(reference, pairs)
            (-logsigmoid(BETA * (gains[:, 0] - gains[:, 1])).mean()).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    net.eval()
    before, gains = [], []
    with torch.inference_mode():
        for first in range(0, len(held_out), 32):
            pairs = [_encode(tokenizer, pair, length) for pair in held_out[first : first + 32]]
            before.append(_log_probs(reference, pairs))
            gains.append(_log_probs(net, pairs) - before[-1])
    return Accuracies(*(float((found[:, 0] > found[:, 1]).float().mean()) for found in map(torch.cat, (before, gains))))


def _encode(tokenizer: Any, pair: Pair, length: int) -> list[tuple[list[int], int]]:
    """Of each answer, the tokens up to the one that ends it, and how many of them are the prompt's."""
    found = []
    for answer in (pair.chosen, pair.rejected):
        messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (asked, text)]
        found.append((ids[1][:length], len(ids[0])))
    return found


def _log_probs(net: Any, pairs: Sequence[list[tuple[list[int], int]]]) -> torch.Tensor:
    """The log-probabilities of the answers [B, 2]: sums over their tokens."""
    rows = [row for pair in pairs for row in pair]
    ids_ST = torch.zeros(len(rows), max(len(ids) for ids, _ in rows), dtype=torch.long)
    is_answer_ST = torch.zeros_like(ids_ST, dtype=torch.bool)
    for place, (ids, asked) in enumerate(rows):
        ids_ST[place, : len(ids)] = torch.tensor(ids)
        is_answer_ST[place, asked : len(ids)] = True
    # The padding comes last, and the model reads from left to right.
    found_STV = net(input_ids=ids_ST).logits[:, :-1].log_softmax(-1)
    of_next_ST = found_STV.gather(2, ids_ST[:, 1:, None])[..., 0]
    return (of_next_ST * is_answer_ST[:, 1:]).sum(1).view(-1, 2)
