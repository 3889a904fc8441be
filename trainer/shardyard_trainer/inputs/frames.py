"""The special tokens that a tokenizer puts around a text, or around and between a pair, found with a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextFrame:
    """The special tokens before and after a text, and the type ids before, in and after it."""

    before: list[int]
    after: list[int]
    types: tuple[int, int, int]


@dataclass(frozen=True)
class PairFrame:
    """The special tokens before, between and after two texts, and the type ids of these three and of both texts."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[int, int, int, int, int]

    @property
    def num_tokens(self) -> int:
        """The number of special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
        """The token ids and type ids of a pair with its special tokens."""
        parts = (self.before, first, self.between, second, self.after)
        ids = [token for part in parts for token in part]
        return ids, [kind for part, kind in zip(parts, self.types, strict=True) for _ in part]


def text_frame(tokenizer: Any) -> TextFrame:
    """The special tokens of single texts."""
    ids, types, bare = _probed(tokenizer, "a")
    at = _find(ids, bare[0], 0)
    before, after = ids[:at], ids[at + len(bare[0]) :]
    return TextFrame(before, after, (types[0] if before else 0, types[at] if types else 0, types[-1] if after else 0))


def pair_frame(tokenizer: Any) -> PairFrame:
    """The special tokens of pairs."""
    ids, types, (one, other) = _probed(tokenizer, "a", "b")
    first = _find(ids, one, 0)
    second = _find(ids, other, first + len(one))
    parts = [(0, first), (first, first + len(one)), (first + len(one), second), (second, second + len(other))]
    parts.append((second + len(other), len(ids)))
    kinds = [types[begin] if begin < end else 0 for begin, end in parts]
    before, _, between, _, after = (ids[begin:end] for begin, end in parts)
    return PairFrame(before, between, after, (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]))


def _probed(tokenizer: Any, *texts: str) -> tuple[list[int], list[int], list[list[int]]]:
    """The ids and type ids of texts with special tokens, and the ids of each text alone."""
    whole = tokenizer(*texts, return_token_type_ids=True)
    bare = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return list(whole["input_ids"]), list(whole["token_type_ids"]), bare


def _find(ids: Sequence[int], part: Sequence[int], begin: int) -> int:
    """The first place of a part from `begin` on; `begin` if the part is empty or missing."""
    places = range(begin, len(ids) - len(part) + 1) if part else range(0)
    return next((at for at in places if list(ids[at : at + len(part)]) == list(part)), begin)
