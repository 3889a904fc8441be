"""How a causal language model continues texts: token by token, each text with its own random stream.

An answer depends only on the model, the text, its place in the call and the seed. Therefore texts are computed
together only if they have the same number of tokens, and none is padded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import Any

import torch

from shardyard_trainer.inputs.base import seed_for
from shardyard_trainer.models import architectures
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.sampling import Sampling, choose

TEXTS_AT_ONCE = 16
TOKENS_AT_ONCE = 16
"""Tokens generated for each text between two turns."""


def continue_texts(
    model: Loaded, prompts: Sequence[list[int]], sampling: Sampling, places: Sequence[int]
) -> Generator[None, None, list[list[int]]]:
    """The new tokens of each prompt, without the end token; every prompt has at least one token.

    Yields every few tokens, so that others have a turn. `places` are the prompts' places in their calls.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    continued: list[list[int]] = [[] for _ in prompts]
    for indices in by_length.values():
        for start in range(0, len(indices), TEXTS_AT_ONCE):
            batch = indices[start : start + TEXTS_AT_ONCE]
            seeds = [seed_for("generate", sampling.seed, places[index]) for index in batch]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            found = yield from _continue(model, [prompts[index] for index in batch], sampling, generators)
            for index, tokens in zip(batch, found, strict=True):
                continued[index] = tokens
    return continued


def _continue(
    model: Loaded, prompts: list[list[int]], sampling: Sampling, generators: list[torch.Generator]
) -> Generator[None, None, list[list[int]]]:
    has_cache = model.folder.model_type not in architectures.WITHOUT_CACHE
    context_BT = torch.tensor(prompts)
    if model.longest is not None:
        context_BT = context_BT[:, -model.longest :]
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    cache: Any = None
    feed_BT = context_BT
    for step in range(sampling.max_new_tokens):
        if step % TOKENS_AT_ONCE == TOKENS_AT_ONCE - 1:
            yield
        # Set around each step only: a mode held over a `yield` would also apply to other computations.
        with torch.inference_mode():
            output: Any = model.model(input_ids=feed_BT, past_key_values=cache, use_cache=has_cache)
        # Models without cached keys and values (openai-gpt, Mamba, RWKV) read the whole text again.
        cache = getattr(output, "past_key_values", None)
        chosen = [
            choose(logits_V, sampling, generator, [*prompts[row], *new[row]], len(new[row]), source=prompts[row])
            for row, (logits_V, generator) in enumerate(zip(output.logits[:, -1].float(), generators, strict=True))
        ]
        for row in sorted(open_rows):
            if chosen[row] in sampling.ends:
                open_rows.discard(row)
            else:
                new[row].append(chosen[row])
        if not open_rows:
            break
        new_BT = torch.tensor(chosen).unsqueeze(1)
        context_BT = torch.cat([context_BT, new_BT], dim=1)
        feed_BT = context_BT if cache is None else new_BT
        if model.longest is not None and context_BT.shape[1] > model.longest:
            # The window is full: continue from its newer half, so that one long pass serves many tokens.
            context_BT = context_BT[:, -max(model.longest // 2, 1) :]
            feed_BT, cache = context_BT, None
    return new
