"""Generation with an encoder-decoder: token by token, or with beam search; the same in evaluation and `Predict`.

Beams are searched as transformers does it: a finished text's score is its log-probability divided by its length to the
power of the length penalty, and the search ends once no open beam can become better than all finished ones.
Shape suffixes: B texts, K beams of each, N = B K rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.modeling_outputs import BaseModelOutput

from shardyard_trainer.tasks.generate import TOKENS_AT_ONCE
from shardyard_trainer.tasks.sampling import Sampling, allowed, choose

Forward = Callable[..., Any]
"""`step` of a model, or a module that passes its arguments on to it."""


def step(
    model: Any,
    *,
    attention_mask: torch.Tensor,
    input_ids: torch.Tensor | None = None,
    encoded: torch.Tensor | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    cache: Any = None,
) -> Any:
    """The encoder's states of `input_ids` [N, S, D]; or, from these, the next token's logits [N, V] and the cache."""
    if encoded is None:
        return model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1].float(), output.past_key_values


def write_texts(
    forward: Forward,
    inputs: Mapping[str, torch.Tensor],
    how: Sampling,
    *,
    start: int,
    generators: Sequence[torch.Generator | None] = (),
    go_on: Callable[[bool], bool] = lambda is_open: is_open,
) -> Generator[None, None, list[list[int]]]:
    """The tokens of each text, without start and end; `inputs` are `input_ids` and `attention_mask` [B, S].

    Yields every few tokens, so that others have a turn. `go_on` is called after each token with whether a text is
    unfinished; generation ends when it returns false.
    """
    ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
    num_texts, num_beams = len(ids_BS), how.num_beams
    drawn = generators or [None] * num_texts
    sources = [ids_S[mask_S.bool()].tolist() for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True)]
    texts: list[Text] = [
        Beams(how, start, source) if num_beams > 1 else OnePath(how, start, source, generator)
        for source, generator in zip(sources, drawn, strict=True)
    ]
    encoded_NSD = forward(input_ids=ids_BS, attention_mask=mask_BS)
    if num_beams > 1:
        encoded_NSD, mask_BS = (each.repeat_interleave(num_beams, 0) for each in (encoded_NSD, mask_BS))
    read_N1 = torch.full((num_texts * num_beams, 1), start, device=ids_BS.device)
    cache: Any = None
    for number in range(how.max_new_tokens):
        if number % TOKENS_AT_ONCE == TOKENS_AT_ONCE - 1:
            yield
        logits_NV, cache = forward(encoded=encoded_NSD, attention_mask=mask_BS, decoder_input_ids=read_N1, cache=cache)
        logits_BKV = logits_NV.cpu().unflatten(0, (num_texts, num_beams))
        chosen = [text.advance(logits_KV) for text, logits_KV in zip(texts, logits_BKV, strict=True)]
        if not go_on(any(text.is_open for text in texts)):
            break
        read_N1 = torch.tensor([[token] for tokens, _ in chosen for token in tokens], device=ids_BS.device)
        if num_beams > 1:
            parents = [at * num_beams + parent for at, (_, found) in enumerate(chosen) for parent in found]
            cache.reorder_cache(torch.tensor(parents, device=ids_BS.device))
    return [text.best() for text in texts]


class Text(Protocol):
    """A text that is being written."""

    @property
    def is_open(self) -> bool:
        """Whether it can still get tokens."""

    def advance(self, logits_KV: torch.Tensor) -> tuple[list[int], list[int]]:
        """Takes the logits of its rows; the tokens they continue with, and the row that each one continues."""

    def best(self) -> list[int]:
        """The tokens of the text, without start and end."""


@dataclass
class OnePath:
    """A text that continues on one path: the likeliest token, or one that is drawn."""

    how: Sampling
    start: int
    source: Sequence[int]
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)
    is_open: bool = True

    def advance(self, logits_KV: torch.Tensor) -> tuple[list[int], list[int]]:
        """The next token."""
        token = self.start
        if self.is_open:
            before = [self.start, *self.tokens]
            token = choose(logits_KV[0], self.how, self.generator, before, len(self.tokens), source=self.source)
            if token in self.how.ends:
                self.is_open = False
            else:
                self.tokens.append(token)
        return [token], [0]

    def best(self) -> list[int]:
        """All tokens."""
        return self.tokens


@dataclass
class Beams:
    """The best `num_beams` beginnings of a text, and the best finished ones."""

    how: Sampling
    start: int
    source: Sequence[int]
    scores: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    is_open: bool = True

    def __post_init__(self) -> None:
        # All beams are equal at the start, so only the first one counts.
        self.rows = [[] for _ in range(self.how.num_beams)]
        self.scores = [0.0] + [-1e9] * (self.how.num_beams - 1)

    def advance(self, logits_KV: torch.Tensor) -> tuple[list[int], list[int]]:
        """The tokens of the best open beams, and the beam that each one continues."""
        how, size = self.how, self.how.num_beams
        if not self.is_open:
            return [self.start] * size, list(range(size))
        length = len(self.rows[0]) + 1
        log_KV = logits_KV.log_softmax(-1)
        log_KV = torch.stack(
            [
                allowed(log_V, how, [self.start, *row], len(row), self.source) + score
                for log_V, row, score in zip(log_KV, self.rows, self.scores, strict=True)
            ]
        )
        # Enough candidates that some remain even if the likeliest ones all end the text.
        num_kept = min(max(2, 1 + len(how.ends)) * size, log_KV.numel())
        scores, places = log_KV.flatten().topk(num_kept)
        found = [
            (score, place // log_KV.shape[1], place % log_KV.shape[1])
            for score, place in zip(scores.tolist(), places.tolist(), strict=True)
        ]
        is_last = length == how.max_new_tokens
        for rank, (score, row, token) in enumerate(found):
            if rank < size and (token in how.ends or is_last):
                own = [] if token in how.ends else [token]
                self._finish(score / length**how.length_penalty, [*self.rows[row], *own])
        going = [each for each in found if each[2] not in how.ends][:size]
        going += [(-1e9, 0, self.start)] * (size - len(going))
        self.rows = [[*self.rows[row], token] for _, row, token in going]
        self.scores = [score for score, _, _ in going]
        self.is_open = not is_last and self._can_improve(length)
        return [token for _, _, token in going], [row for _, row, _ in going]

    def best(self) -> list[int]:
        """The finished text with the highest score."""
        return max(self.finished, key=lambda each: each[0])[1] if self.finished else self.rows[0]

    def _finish(self, score: float, tokens: list[int]) -> None:
        # Of equal scores the earlier text stays first.
        self.finished = sorted([*self.finished, (score, tokens)], key=lambda each: -each[0])[: self.how.num_beams]

    def _can_improve(self, length: int) -> bool:
        if len(self.finished) < self.how.num_beams:
            return True
        how = self.how
        counted = how.max_new_tokens if how.goes_on and how.length_penalty > 0 else length
        best_open = self.scores[0] / counted**how.length_penalty
        return not how.stops_early and best_open > self.finished[-1][0]
