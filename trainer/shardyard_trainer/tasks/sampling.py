"""How the next token is chosen: by the request's parameters, else by the model's generation_config.json.

The settings have transformers' meaning, in transformers' order: repetitions, lengths and forbidden tokens first, then
temperature, top_k and top_p. Only encoder-decoders search with beams (`writing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardyard.v1 import model_service_pb2

DEFAULT_NEW_TOKENS = 40
MOST_NEW_TOKENS = 1024
MOST_BEAMS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0: the likeliest. `ends` are the tokens that end a text."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ends: frozenset[int] = frozenset()
    top_k: int = 0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    forced_first: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    stops_early: bool = False
    """With beams: whether the search ends once as many texts as beams have ended."""


def sampling_of(
    given: model_service_pb2.GenerationParameters, settings: Mapping[str, Any], ends: frozenset[int]
) -> Sampling:
    """A request's parameters; those it leaves out come from the model's settings."""
    own_length = min(max(settings.get("max_new_tokens", DEFAULT_NEW_TOKENS), 1), MOST_NEW_TOKENS)
    own_temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
    return Sampling(
        max_new_tokens=given.max_new_tokens if given.HasField("max_new_tokens") else own_length,
        temperature=given.temperature if given.HasField("temperature") else own_temperature,
        top_p=given.top_p if given.HasField("top_p") else float(settings.get("top_p", 1.0)),
        seed=given.seed,
        ends=ends,
        top_k=settings.get("top_k", 0),
        min_new_tokens=settings.get("min_new_tokens", 0),
        repetition_penalty=float(settings.get("repetition_penalty", 1.0)),
        no_repeat_ngram_size=settings.get("no_repeat_ngram_size", 0),
        suppressed=tuple(settings.get("suppress_tokens", ())),
        suppressed_first=tuple(settings.get("begin_suppress_tokens", ())),
        forced_first=settings.get("forced_bos_token_id"),
        num_beams=given.num_beams if given.HasField("num_beams") else min(settings.get("num_beams", 1), MOST_BEAMS),
        length_penalty=given.length_penalty
        if given.HasField("length_penalty")
        else settings.get("length_penalty", 1.0),
        stops_early=bool(settings.get("early_stopping")),
    )


def choose(
    logits_V: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    before: Sequence[int] = (),
    num_new: int = 0,
) -> int:
    """The next token after the tokens `before`, the last `num_new` of which were generated.

    The likeliest, or one drawn from the nucleus of probability top_p (Holtzman et al., 2020).
    """
    logits_V = allowed(logits_V, sampling, before, num_new)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Subtract the largest before dividing: the smallest temperature then gives 0 and minus infinity, never NaN.
    scaled_V = (logits_V.double() - logits_V.max()) / sampling.temperature
    probabilities_V, tokens_V = scaled_V.softmax(-1).sort(descending=True, stable=True)
    if sampling.top_k > 0:
        probabilities_V[sampling.top_k :] = 0
        probabilities_V /= probabilities_V.sum()
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    # The likeliest token is kept even at top_p 0.
    kept_V = torch.where((before_V < sampling.top_p) | (before_V == 0), probabilities_V, 0.0)
    return int(tokens_V[torch.multinomial(kept_V, 1, generator=generator)])


def allowed(logits_V: torch.Tensor, sampling: Sampling, before: Sequence[int], num_new: int) -> torch.Tensor:
    """Makes repeated tokens less likely and forbidden ones impossible; takes logits or log-probabilities."""
    logits_V = logits_V.clone()
    if sampling.repetition_penalty not in (0.0, 1.0) and before:
        # Keskar et al., 2019: a repeated token becomes less likely, whatever its logit's sign.
        seen = torch.tensor(sorted(set(before)))
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values < 0, values * penalty, values / penalty)
    forbidden = set(sampling.suppressed) | _repeated(before, sampling.no_repeat_ngram_size)
    if num_new < sampling.min_new_tokens:
        forbidden |= sampling.ends
    if num_new == 0:
        forbidden |= set(sampling.suppressed_first)
        if sampling.forced_first is not None and 0 <= sampling.forced_first < len(logits_V):
            forbidden = set(range(len(logits_V))) - {sampling.forced_first}
    forbidden = {token for token in forbidden if 0 <= token < len(logits_V)}
    if forbidden and len(forbidden) < len(logits_V):
        logits_V[sorted(forbidden)] = -torch.inf
    return logits_V


def _repeated(before: Sequence[int], size: int) -> set[int]:
    """The tokens that would repeat an earlier run of `size` tokens."""
    if size < 1 or len(before) + 1 < size:
        return set()
    tail = tuple(before[len(before) - size + 1 :])
    return {before[i + size - 1] for i in range(len(before) - size + 1) if tuple(before[i : i + size - 1]) == tail}
