"""Code shared by predictors that explain their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import listed, nearest, shorten
from shardyard_trainer.explaining.integral import Unexplainable
from shardyard_trainer.explaining.words import Token, shares_of_words
from shardyard_trainer.tasks.base import violation

_NAMED = 10_000
"""Names among which a similar one is looked for: comparing with more takes seconds."""


class Blank(NamedTuple):
    """The token that stands for none in the baseline, and what the baseline is in words."""

    token: int
    baseline: str


def blank_of(tokenizer: Any, model: Any) -> Blank:
    """The mask if the tokenizer has one, else the padding, the unknown or the end token. Raises Unexplainable."""
    for role in ("mask", "pad", "unk", "eos"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None and token < model.config.vocab_size:
            name = getattr(tokenizer, f"{role}_token")
            return Blank(int(token), f"the same text with {name} in the place of each of its tokens")
    raise Unexplainable("its tokenizer has no mask, padding, unknown or end token that a text could be compared with")


def put_words(
    explanation: model_service_pb2.Explanation,
    shares_1T: torch.Tensor,
    texts: dict[str, str],
    places: Sequence[tuple[str, int, int] | None],
) -> None:
    """Puts the shares of words into the answer; `places` are part and place of each token, None for special ones."""
    shares = shares_1T[0].tolist()
    tokens = [Token(*place, share) for place, share in zip(places, shares, strict=False) if place is not None]
    rest = sum(shares) - sum(token.share for token in tokens)
    found = shares_of_words(texts, tokens, rest)
    explanation.attributions.extend(found.attributions)
    explanation.rest = found.rest


def refuse_name(
    request: model_service_pb2.ExplainPredictionRequest, names: Sequence[str], what: str
) -> list[worker_pb2.Violation]:
    """A violation if `target` is none of the model's names; `what` they are, such as `class`."""
    if not request.HasField("target") or request.target in names:
        return []
    hint = nearest(request.target, names) if len(names) <= _NAMED else ""
    text = f"`{shorten(request.target)}` is not a {what} of this model; it has {listed(names, most=5)}{hint}"
    return [violation("target", "SPEC_INVALID", text)]


def refuse_any(request: model_service_pb2.ExplainPredictionRequest, why: str) -> list[worker_pb2.Violation]:
    """A violation if there is a `target`, for models with one output."""
    if not request.HasField("target"):
        return []
    return [violation("target", "TASK_MISMATCH", f"{why}; leave the target out")]


def refuse_word(request: model_service_pb2.ExplainPredictionRequest, task: str) -> list[worker_pb2.Violation]:
    """A violation if there is a `word`, for models that do not tag words."""
    if not request.HasField("word"):
        return []
    text = f"the model is one for {task}, which has one answer for all words; leave the word out"
    return [violation("word", "TASK_MISMATCH", text)]
