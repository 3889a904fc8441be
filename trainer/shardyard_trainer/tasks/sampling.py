"""How the next token is chosen: by the request's parameters, else by the model's generation_config.json.

The settings have transformers' meaning, in transformers' order: biases, repetitions, lengths, forced and forbidden
tokens first (`allowed`), then temperature, top_k, top_p, min_p and typical_p. Only encoder-decoders search with beams
(`writing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardyard.v1 import model_service_pb2

DEFAULT_NEW_TOKENS = 40
MOST_NEW_TOKENS = 1024
MOST_BEAMS = 16

Run = tuple[int, ...]
"""Tokens one after another."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0: the likeliest. `ends` are the tokens that end a text."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ends: frozenset[int] = frozenset()
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    min_length: int = 0
    """Counts the prompt, or the decoder's start token."""
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    source_repetition_penalty: float = 1.0
    """Over 1 makes the tokens of the source likelier, unlike `repetition_penalty`."""
    source_no_repeat_ngram_size: int = 0
    biases: tuple[tuple[Run, float], ...] = ()
    forbidden: tuple[Run, ...] = ()
    suppressed: Run = ()
    suppressed_first: Run = ()
    forced_first: int | None = None
    forced_last: Run = ()
    decay: tuple[int, float] | None = None
    """After so many new tokens the end becomes likelier, by a factor that grows with each."""
    renormalizes: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    stops_early: bool = False
    """With beams: whether the search ends once as many texts as beams have ended."""
    goes_on: bool = False
    """With beams: whether the search lasts until no text of any length can become better."""


def sampling_of(
    given: model_service_pb2.GenerationParameters, settings: Mapping[str, Any], ends: frozenset[int]
) -> Sampling:
    """A request's parameters; those it leaves out come from the model's settings."""
    own_length = min(max(settings.get("max_new_tokens", DEFAULT_NEW_TOKENS), 1), MOST_NEW_TOKENS)
    own_temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
    own_last = settings.get("forced_eos_token_id", [])
    return Sampling(
        max_new_tokens=given.max_new_tokens if given.HasField("max_new_tokens") else own_length,
        temperature=given.temperature if given.HasField("temperature") else own_temperature,
        top_p=given.top_p if given.HasField("top_p") else float(settings.get("top_p", 1.0)),
        seed=given.seed,
        ends=ends,
        # transformers draws of 50 if nothing is set; a request's own temperature draws of all.
        top_k=settings.get("top_k", 50 if settings.get("do_sample") else 0),
        min_p=settings.get("min_p", 0.0),
        typical_p=settings.get("typical_p", 1.0),
        # The newer setting counts, as in transformers.
        min_length=0 if "min_new_tokens" in settings else settings.get("min_length", 0),
        min_new_tokens=settings.get("min_new_tokens", 0),
        repetition_penalty=float(settings.get("repetition_penalty", 1.0)),
        no_repeat_ngram_size=settings.get("no_repeat_ngram_size", 0),
        source_repetition_penalty=float(settings.get("encoder_repetition_penalty", 1.0)),
        source_no_repeat_ngram_size=settings.get("encoder_no_repeat_ngram_size", 0),
        biases=tuple((tuple(run), float(bias)) for run, bias in settings.get("sequence_bias", ())),
        forbidden=tuple(tuple(run) for run in settings.get("bad_words_ids", ())),
        suppressed=tuple(settings.get("suppress_tokens", ())),
        suppressed_first=tuple(settings.get("begin_suppress_tokens", ())),
        forced_first=settings.get("forced_bos_token_id"),
        forced_last=tuple(own_last) if isinstance(own_last, list) else (own_last,),
        decay=tuple(settings["exponential_decay_length_penalty"])
        if "exponential_decay_length_penalty" in settings
        else None,
        renormalizes=settings.get("renormalize_logits", False),
        num_beams=given.num_beams if given.HasField("num_beams") else min(settings.get("num_beams", 1), MOST_BEAMS),
        length_penalty=given.length_penalty
        if given.HasField("length_penalty")
        else settings.get("length_penalty", 1.0),
        stops_early=settings.get("early_stopping") is True,
        goes_on=settings.get("early_stopping") == "never",
    )


def choose(
    logits_V: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    before: Sequence[int] = (),
    num_new: int = 0,
    *,
    source: Sequence[int] = (),
) -> int:
    """The next token after the tokens `before`, the last `num_new` of which were generated from the tokens `source`.

    The likeliest, or one drawn from the nucleus of probability top_p (Holtzman et al., 2020).
    """
    logits_V = allowed(logits_V, sampling, before, num_new, source)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    likely_V, tokens_V = drawn_from(logits_V, sampling)
    return int(tokens_V[torch.multinomial(likely_V, 1, generator=generator)])


def drawn_from(logits_V: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """How likely tokens are drawn, not normalised, float64; and the tokens, the likeliest first."""
    # Subtract the largest before dividing: the smallest temperature then gives 0 and minus infinity, never NaN.
    scaled_V = (logits_V.double() - logits_V.max()) / sampling.temperature
    likely_V, tokens_V = scaled_V.softmax(-1).sort(descending=True, stable=True)
    if sampling.top_k > 0:
        likely_V[sampling.top_k :] = 0
        likely_V /= likely_V.sum()
    before_V = likely_V.cumsum(-1) - likely_V
    # The likeliest token is kept even at top_p 0.
    likely_V = torch.where((before_V < sampling.top_p) | (before_V == 0), likely_V, 0.0)
    likely_V[likely_V < sampling.min_p * likely_V[0]] = 0
    if sampling.typical_p < 1:
        likely_V = _typical(likely_V / likely_V.sum(), sampling.typical_p)
    return likely_V, tokens_V


def _typical(likely_V: torch.Tensor, mass: float) -> torch.Tensor:
    """Only the tokens whose surprise is nearest to the expected one, of that probability together.

    Meister et al., 2022.
    """
    surprise_V = -likely_V.log()
    expected = torch.special.entr(likely_V).sum()
    distance_V, order_V = (surprise_V - expected).abs().sort(stable=True)
    last = min(int((likely_V[order_V].cumsum(-1) < mass).sum()), len(likely_V) - 1)
    kept_V = distance_V <= distance_V[last]
    kept_V[0] = True
    return torch.zeros_like(likely_V).scatter(0, order_V, torch.where(kept_V, likely_V[order_V], 0.0))


def allowed(
    logits_V: torch.Tensor, sampling: Sampling, before: Sequence[int], num_new: int, source: Sequence[int] = ()
) -> torch.Tensor:
    """Makes tokens likelier or less likely, and forbidden ones impossible; takes logits or log-probabilities.

    If that leaves no token, all are as before.
    """
    found_V = logits_V.clone()
    biased = [(run[-1], bias) for run, bias in sampling.biases if _ends_with(before, run[:-1])]
    if biased := [(token, bias) for token, bias in biased if token < len(found_V)]:
        tokens, added = zip(*biased, strict=True)
        found_V.index_add_(0, torch.tensor(tokens), torch.tensor(added, dtype=found_V.dtype))
    if source and sampling.source_repetition_penalty not in (0.0, 1.0):
        _penalize(found_V, source, 1 / sampling.source_repetition_penalty)
    if before and sampling.repetition_penalty not in (0.0, 1.0):
        _penalize(found_V, before, sampling.repetition_penalty)
    _forbid(found_V, _ruled_out(sampling, before, num_new, source))
    found_V = _forced(found_V, sampling, before, num_new)
    if sampling.decay is not None and num_new > sampling.decay[0]:
        _draw_to_the_end(found_V, sampling, num_new - sampling.decay[0])
    _forbid(found_V, sampling.suppressed)
    if num_new == (1 if sampling.forced_first is not None and len(before) - num_new <= 1 else 0):
        _forbid(found_V, sampling.suppressed_first)
    if not found_V.max() > -torch.inf:
        return logits_V.clone()
    return found_V.log_softmax(-1) if sampling.renormalizes else found_V


def _penalize(logits_V: torch.Tensor, tokens: Sequence[int], penalty: float) -> None:
    # Keskar et al., 2019: a repeated token becomes less likely, whatever its logit's sign.
    seen = torch.tensor(sorted(token for token in set(tokens) if token < len(logits_V)), dtype=torch.long)
    values = logits_V[seen]
    logits_V[seen] = torch.where(values < 0, values * penalty, values / penalty)


def _forbid(logits_V: torch.Tensor, tokens: Iterable[int]) -> None:
    forbidden = sorted({token for token in tokens if 0 <= token < len(logits_V)})
    if forbidden:
        logits_V[forbidden] = -torch.inf


def _ruled_out(sampling: Sampling, before: Sequence[int], num_new: int, source: Sequence[int]) -> set[int]:
    """The tokens that would repeat something or write a forbidden run, and the ends of a text that is too short."""
    found = _repeated(before, before, sampling.no_repeat_ngram_size)
    found |= _repeated(source, before, sampling.source_no_repeat_ngram_size)
    # An end alone is never forbidden.
    runs = [run for run in sampling.forbidden if len(run) > 1 or run[0] not in sampling.ends]
    found |= {run[-1] for run in runs if _ends_with(before, run[:-1])}
    if num_new < sampling.min_new_tokens or len(before) < sampling.min_length:
        found |= sampling.ends
    return found


def _forced(logits_V: torch.Tensor, sampling: Sampling, before: Sequence[int], num_new: int) -> torch.Tensor:
    """The same, or at a place that is forced nothing but its tokens, which then are certain."""
    tokens: Sequence[int] = ()
    if sampling.forced_first is not None and num_new == 0 and len(before) == 1:
        tokens = (sampling.forced_first,)
    if sampling.forced_last and num_new == sampling.max_new_tokens - 1:
        tokens = sampling.forced_last
    tokens = [token for token in tokens if 0 <= token < len(logits_V)]
    if not tokens:
        return logits_V
    certain_V = torch.full_like(logits_V, -torch.inf)
    certain_V[tokens] = 0
    return certain_V


def _draw_to_the_end(logits_V: torch.Tensor, sampling: Sampling, num_over: int) -> None:
    """Makes the ends likelier by a factor for each token over the length at which it begins."""
    _, factor = sampling.decay or (0, 1.0)
    grown = math.exp(min(num_over * math.log(factor), 60.0)) - 1  # bounded, so that it stays a number
    for token in sampling.ends:
        if token < len(logits_V) and logits_V[token].isfinite():
            logits_V[token] += logits_V[token].abs() * grown


def _ends_with(before: Sequence[int], run: Sequence[int]) -> bool:
    return len(run) <= len(before) and (not run or tuple(before[-len(run) :]) == tuple(run))


def _repeated(earlier: Sequence[int], before: Sequence[int], size: int) -> set[int]:
    """The tokens that would make the end of `before` a run of `size` tokens of `earlier`."""
    if size < 1 or len(before) + 1 < size:
        return set()
    tail = tuple(before[len(before) - size + 1 :])
    return {earlier[i + size - 1] for i in range(len(earlier) - size + 1) if tuple(earlier[i : i + size - 1]) == tail}
