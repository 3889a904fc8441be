"""Explains the answer to a question: the logits of its first and last token, by the words of question and context.

Shape suffixes: W windows, N rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from shardyard.v1 import model_service_pb2
from shardyard_trainer.explaining.embeddings import line_of_tokens
from shardyard_trainer.explaining.integral import Unexplainable
from shardyard_trainer.inputs.base import batches
from shardyard_trainer.inputs.contexts import ContextCutter, ContextWindow
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answer_spans import span_logits, trimmed
from shardyard_trainer.tasks.base import Explained
from shardyard_trainer.tasks.explained import blank_of, put_words


class Found(NamedTuple):
    """Where an answer is: its window, the positions of its first and last token, and the sum of their logits."""

    window: ContextWindow
    first: int
    last: int
    score: float


class AskedTexts(NamedTuple):
    """A question and its context, the names of these parts of the instance, and their windows."""

    question: str
    context: str
    names: tuple[str, str]
    windows: Sequence[ContextWindow]


class Answering(NamedTuple):
    """A model that answers questions; `rest` is the position that scores no answer, from the end if negative."""

    loaded: Loaded
    inputs: TextInputs
    cutter: ContextCutter
    rest: int | None


def explain_answer(by: Answering, asked: AskedTexts, answer: model_service_pb2.Answer) -> Explained:
    """The explanation of an answer that a model gave. Raises Unexplainable."""
    found = _find(by, asked, answer)
    model, window = by.loaded.model, found.window
    places = _places(by.cutter, asked, window)
    blank = blank_of(by.inputs.tokenizer, model)
    blanked = [token if place is None else blank.token for token, place in zip(window.ids, places, strict=True)]
    encoded = EncodedText(window.ids, window.type_ids)

    def outputs(count: int) -> torch.Tensor:
        logits_NT2 = span_logits(model, by.inputs.tensors(model, [encoded] * count))
        return logits_NT2[:, found.first, 0] + logits_NT2[:, found.last, 1]

    def fill(shares_1T: torch.Tensor, explanation: model_service_pb2.Explanation) -> None:
        explanation.target = answer.text
        texts = dict(zip(asked.names, (asked.question, asked.context), strict=True))
        put_words(explanation, shares_1T, texts, places)

    return Explained(line_of_tokens(model, window.ids, blanked, outputs), blank.baseline, fill)


def _find(by: Answering, asked: AskedTexts, answer: model_service_pb2.Answer) -> Found:
    """The place of an answer in the windows with the best score; of no answer, that with the lowest.

    Raises Unexplainable if it is in none.
    """
    found: list[Found] = []
    for batch in batches(asked.windows):
        chosen = [asked.windows[at] for at in batch]
        texts = [EncodedText(window.ids, window.type_ids) for window in chosen]
        with torch.inference_mode():
            logits_WT2 = span_logits(by.loaded.model, by.inputs.tensors(by.loaded.model, texts)).cpu()
        for window, logits_T2 in zip(chosen, logits_WT2, strict=True):
            for first, last in _places_of(window, asked.context, answer, by.rest):
                found.append(Found(window, first, last, float(logits_T2[first, 0] + logits_T2[last, 1])))
    if not found:
        raise Unexplainable("it gives no answer to this question, and has no token that says that there is none")
    choose = max if answer.text else min
    return choose(found, key=lambda each: each.score)


def _places_of(
    window: ContextWindow, context: str, answer: model_service_pb2.Answer, rest: int | None
) -> Iterator[tuple[int, int]]:
    """The positions of the first and the last token of an answer in a window; there may be white space around it."""
    if not answer.text:
        if rest is not None:
            place = rest % len(window.ids)
            yield place, place
        return
    firsts = [at for at, (start, end) in enumerate(window.offsets) if start <= answer.start < end]
    lasts = [at for at, (start, end) in enumerate(window.offsets) if start < answer.end <= end]
    for first in firsts:
        for last in lasts:
            start, end = window.offsets[first][0], window.offsets[last][1]
            if first <= last and trimmed(context, start, end) == (answer.start, answer.end):
                yield window.first + first, window.first + last


def _places(cutter: ContextCutter, asked: AskedTexts, window: ContextWindow) -> list[tuple[str, int, int] | None]:
    """The part and the place of each token of a window; None for special tokens."""
    places: list[tuple[str, int, int] | None] = [None] * len(window.ids)
    for at, (start, end) in enumerate(cutter.question_places(asked.question), start=cutter.question_begins):
        places[at] = (asked.names[0], start, end)
    for at, (start, end) in enumerate(window.offsets, start=window.first):
        places[at] = (asked.names[1], start, end)
    return places
