"""The shares of words, from those of their tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from shardyard.v1 import explanation_pb2
from shardyard_trainer.data.word_split import split_words


class Token(NamedTuple):
    """A token of a part of an instance, at `start` to `end` in its characters, and its share."""

    part: str
    start: int
    end: int
    share: float


class WordShares(NamedTuple):
    """The shares of words and signs in their order, and that of the tokens that are of none."""

    attributions: list[explanation_pb2.Attribution]
    rest: float


def shares_of_words(texts: dict[str, str], tokens: Sequence[Token], rest: float) -> WordShares:
    """Adds up tokens to words. `texts` are the parts by their names; `rest` is the share of tokens of none of them.

    A token of several words joins these; one of white space alone stays as it is; one without characters goes to the
    rest.
    """
    found: list[explanation_pb2.Attribution] = []
    for part, text in texts.items():
        words = split_words(text)
        starts, ends = [start for start, _ in words], [end for _, end in words]
        groups: list[tuple[int, int, float]] = []
        for token in sorted((each for each in tokens if each.part == part), key=lambda each: (each.start, each.end)):
            if token.start >= token.end:
                rest += token.share
                continue
            start, end = _widened(token, starts, ends, text)
            if groups and start < groups[-1][1]:
                begin, stop, share = groups[-1]
                groups[-1] = (begin, max(stop, end), share + token.share)
            else:
                groups.append((start, end, token.share))
        for start, end, share in groups:
            found.append(
                explanation_pb2.Attribution(part=part, text=text[start:end], start=start, end=end, score=share)
            )
    return WordShares(found, rest)


def _widened(token: Token, starts: Sequence[int], ends: Sequence[int], text: str) -> tuple[int, int]:
    """The place of a token without white space around it, widened to the words that it is of."""
    written = text[token.start : token.end]
    if not written.strip():
        return token.start, token.end
    start = token.start + len(written) - len(written.lstrip())
    end = start + len(written.strip())
    first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
    return (min(start, starts[first]), max(end, ends[last])) if first <= last else (start, end)
