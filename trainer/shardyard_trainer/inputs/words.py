"""Texts given as words, cut into windows of tokens so that every word is answered exactly once.

A word's answer is read at its first token. A text longer than a window is cut between words into windows that overlap;
of two windows that have a word, the one with more context around it owns it. Words are tokenised as one
text, joined by single spaces, so that every tokenizer reads them as it reads any text; a word's tokens are found by
their positions in that text.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardyard_trainer.inputs.frames import text_frame
from shardyard_trainer.inputs.tokenization import encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises


@dataclass(frozen=True)
class Window:
    """Token ids with their special tokens, and type ids.

    `words` has for each token the word that it is of if this window answers for it, else -1; `firsts` says which tokens
    are the first of such a word. `read` has the word that it is of in any case, -1 for special tokens.
    """

    ids: list[int]
    type_ids: list[int]
    words: list[int]
    firsts: list[bool]
    read: list[int]

    @property
    def num_positions(self) -> int:
        """The number of tokens in the window."""
        return len(self.ids)


class WordCutter:
    """Cuts texts for one tokenizer into windows of at most `length` tokens that overlap by about `overlap` tokens."""

    def __init__(self, tokenizer: Any, length: int, overlap: int) -> None:
        self._tokenizer = tokenizer
        frame = text_frame(tokenizer)
        self._before, self._after, self._types = frame.before, frame.after, frame.types
        self._room = max(length - len(self._before) - len(self._after), 1)
        self._overlap = min(overlap, self._room // 2)

    def cut(self, words: Sequence[str]) -> list[Window]:
        """The windows of a text, in order; a text without tokens gets one window of special tokens only."""
        pieces = self._pieces(words)
        # Words without a token, such as a lone control character, are not in any window's answers.
        seen = [word for word, tokens in enumerate(pieces) if tokens]
        if not seen:
            return [self._window([], [], [], [])]
        spans = self._spans([min(len(pieces[word]), self._room) for word in seen])
        windows = []
        for first, last, own_first, own_last in spans:
            ids: list[int] = []
            of: list[int] = []
            firsts: list[bool] = []
            read: list[int] = []
            for at in range(first, last):
                tokens = pieces[seen[at]][: self._room]
                is_own = own_first <= at < own_last
                ids += tokens
                of += [seen[at] if is_own else -1] * len(tokens)
                read += [seen[at]] * len(tokens)
                firsts += [is_own] + [False] * (len(tokens) - 1)
            windows.append(self._window(ids, of, firsts, read))
        return windows

    def _spans(self, sizes: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """(first, end, first owned, end of owned) of each window, in words."""
        bounds: list[tuple[int, int]] = []
        first = 0
        while True:
            last, size = first, 0
            while last < len(sizes) and size + sizes[last] <= self._room:
                size, last = size + sizes[last], last + 1
            bounds.append((first, last))
            if last == len(sizes):
                break
            following, shared = last, 0
            while following - 1 > first and shared + sizes[following - 1] <= self._overlap:
                following -= 1
                shared += sizes[following]
            first = following
        spans = []
        begin = 0
        for at, (first, last) in enumerate(bounds):
            end = last if at + 1 == len(bounds) else (bounds[at + 1][0] + last + 1) // 2
            spans.append((first, last, begin, end))
            begin = end
        return spans

    def _pieces(self, words: Sequence[str]) -> list[list[int]]:
        """The token ids of each word."""
        starts: list[int] = []
        end = 0
        for word in words:
            starts.append(end)
            end += len(word) + 1
        with encoding_raises(encoding_fault):
            encoded = self._tokenizer(
                " ".join(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        pieces: list[list[int]] = [[] for _ in words]
        for token, (begin, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if stop > begin:
                # Located by its last character: some tokens begin with the space before their word.
                pieces[bisect.bisect_right(starts, stop - 1) - 1].append(token)
        return pieces

    def _window(self, ids: list[int], words: list[int], firsts: list[bool], read: list[int]) -> Window:
        if not (ids or self._before or self._after):
            # Even a text without tokens needs one token, or the model has nothing to read.
            blank = self._tokenizer.eos_token_id
            return Window([int(blank or self._tokenizer.pad_token_id or 0)], [0], [-1], [False], [-1])
        before, after = len(self._before), len(self._after)
        first, inner, last = self._types
        return Window(
            [*self._before, *ids, *self._after],
            [*[first] * before, *[inner] * len(ids), *[last] * after],
            [*[-1] * before, *words, *[-1] * after],
            [*[False] * before, *firsts, *[False] * after],
            [*[-1] * before, *read, *[-1] * after],
        )
