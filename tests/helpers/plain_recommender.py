"""Next-item prediction as one writes it in plain PyTorch, to compare with: no code of the trainer."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

CUT = 10


def read_histories(path: Path) -> dict[str, list[str]]:
    """The items of each user in the order of time, of a file of RecBole."""
    rows = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            rows[row["user_id:token"]].append((float(row["timestamp:float"]), row["item_id:token"]))
    return {user: [item for _, item in sorted(of_user, key=lambda row: row[0])] for user, of_user in rows.items()}


def popular_hit_rate(histories: dict[str, list[str]]) -> float:
    """Hit rate at 10 of the most frequent items that a user has not had, the last item of each being held out."""
    counts = Counter(item for items in histories.values() for item in items[:-1])
    ranked = [item for item, _ in counts.most_common()]
    hits = 0
    for *seen, target in histories.values():
        hits += target in [item for item in ranked if item not in set(seen)][:CUT]
    return hits / len(histories)


def train_and_measure(
    histories: dict[str, list[str]], *, longest: int, epochs: int, batch: int, rate: float, dropout: float, seed: int
) -> dict[str, float]:
    """Hit rate and NDCG at 10 over all items, of the last item of each user."""
    torch.manual_seed(seed)
    items = sorted({item for of_user in histories.values() for item in of_user})
    token = {item: at for at, item in enumerate(items, start=1)}
    users = [[token[item] for item in of_user] for of_user in histories.values()]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(items) + 1, n_positions=longest, n_layer=2, n_head=2, n_embd=64,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = math.ceil(len(users) / batch) * epochs
    warm = round(0.1 * steps)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(users)).split(batch):
            windows = [torch.tensor(users[user][:-1][-longest - 1 :]) for user in chosen.tolist()]
            rows = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
            logits = model(rows[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            plan.step()
    model.eval()
    found = {"hr_10": 0.0, "ndcg_10": 0.0}
    with torch.no_grad():
        for *seen, target in users:
            scores = model(torch.tensor([seen[-longest:]])).logits[0, -1]
            scores[[0, *seen]] = -math.inf
            rank = scores.argsort(descending=True).tolist().index(target) + 1
            if rank <= CUT:
                found["hr_10"] += 1 / len(users)
                found["ndcg_10"] += 1 / math.log2(rank + 1) / len(users)
    return found
