"""A question and its context as windows of tokens: each has the question, followed by a part of the context.

The windows are those that transformers' tokenizers make (`truncation="only_second"`, `stride`, the overflowing tokens
kept), made here so that a long question or a wide overlap leaves room for the context in any case.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardyard_trainer.inputs.frames import pair_frame
from shardyard_trainer.inputs.tokenization import encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises


@dataclass(frozen=True)
class ContextWindow:
    """Token ids with their special tokens, and type ids; the context's tokens begin at position `first`.

    These are the context's tokens from number `begin` on; `offsets` are their places in the context: (first
    character, the one after the last).
    """

    ids: list[int]
    type_ids: list[int]
    first: int
    begin: int
    offsets: list[tuple[int, int]]

    @property
    def end(self) -> int:
        """The position after the context's last token."""
        return self.first + len(self.offsets)

    @property
    def num_positions(self) -> int:
        """Its tokens."""
        return len(self.ids)

    def places(self, span: tuple[int, int]) -> tuple[int, int] | None:
        """The positions of a span's first and last token; None if the window does not have all of its tokens."""
        first, last = (number - self.begin for number in span)
        if first < 0 or last >= len(self.offsets):
            return None
        return self.first + first, self.first + last


@dataclass(frozen=True)
class CutContext:
    """The windows of a question with its context, in order (none: no token), and whether the question was cut.

    `offsets` are those of all tokens of the context.
    """

    windows: list[ContextWindow]
    was_cut: bool
    offsets: Sequence[tuple[int, int]]

    def span(self, start: int, end: int) -> tuple[int, int] | None:
        """The numbers of the first and the last token of a part of the context; None if it has no token."""
        first = bisect_right(self.offsets, start, key=lambda offset: offset[1])
        last = bisect_left(self.offsets, end, key=lambda offset: offset[0]) - 1
        return (first, last) if first <= last else None


class ContextCutter:
    """Cuts contexts for one tokenizer into windows of at most `length` tokens that overlap by `overlap` tokens."""

    def __init__(self, tokenizer: Any, length: int, overlap: int) -> None:
        self._tokenizer = tokenizer
        self._frame = pair_frame(tokenizer)
        self._room = max(length - self._frame.num_tokens, 2)
        self._overlap = overlap
        self.rest = self._place_of(tokenizer.cls_token_id)
        """The place of the token that means no answer, from the end if negative; None if there is no such token."""

    def cut(self, asked: Sequence[tuple[str, str]]) -> list[CutContext]:
        """Cuts questions with their contexts. Raises SpecError if the tokenizer fails."""
        contexts = list(dict.fromkeys(context for _, context in asked))
        with encoding_raises(encoding_fault):
            questions = self._tokenizer(
                [question.strip() for question, _ in asked], add_special_tokens=False, verbose=False
            )
            found = self._tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = {
            context: (ids, _whole(context, offsets))
            for context, ids, offsets in zip(contexts, found["input_ids"], found["offset_mapping"], strict=True)
        }
        return [
            self._windows(list(ids), *tokens[context])
            for ids, (_, context) in zip(questions["input_ids"], asked, strict=True)
        ]

    def question_places(self, question: str) -> list[tuple[int, int]]:
        """The places of the question's tokens in its characters, in the order of a window, where they begin it."""
        bare = question.lstrip()
        with encoding_raises(encoding_fault):
            found = self._tokenizer(bare.rstrip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        before = len(question) - len(bare)
        return [(before + start, before + end) for start, end in found["offset_mapping"][: self._room // 2]]

    @property
    def question_begins(self) -> int:
        """The position of the question's first token in every window."""
        return len(self._frame.before)

    def _windows(self, question: list[int], tokens: Sequence[int], offsets: Sequence[tuple[int, int]]) -> CutContext:
        kept = question[: self._room // 2]
        room = self._room - len(kept)
        step = room - min(self._overlap, room // 2)
        windows = []
        for begin in range(0, len(tokens), step):
            ids, types = self._frame.around(kept, tokens[begin : begin + room])
            first = len(self._frame.before) + len(kept) + len(self._frame.between)
            windows.append(ContextWindow(ids, types, first, begin, list(offsets[begin : begin + room])))
            if begin + room >= len(tokens):
                break
        return CutContext(windows, len(kept) < len(question), offsets)

    def _place_of(self, token: int | None) -> int | None:
        if token is not None and token in self._frame.before:
            return self._frame.before.index(token)
        after = self._frame.after
        return after.index(token) - len(after) if token is not None and token in after else None


def _whole(context: str, offsets: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Offsets widened so that no letter or digit before a token is left out.

    Some tokenizers (RobBERT's) say that a word begins at its second letter.
    """
    found, end = [], 0
    for begin, stop in offsets:
        if begin == stop:
            # A token without characters; its offsets may be larger than those of later tokens.
            found.append((end, end))
            continue
        first = begin
        while end < first and context[first - 1].isalnum():
            first -= 1
        found.append((first, stop))
        end = max(end, stop)
    return found
