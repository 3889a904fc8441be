"""Statistics of data for a plan: samples, tokens, the share that is cut, the share of unknown tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from shardyard.v1 import job_pb2, plan_pb2

_MOST_CUT = 0.05
_MOST_UNKNOWN = 0.1
_PART = 2**20


class _About(NamedTuple):
    """Words for the warnings about a split: fields of the spec, and the effect of a blank text."""

    data: str
    tokenizer: str
    blank: str


_TRAINED = _About("", "spec.tokenizer", "its label teaches nothing")
_ABOUT: Mapping[str, _About] = {
    "training": _TRAINED._replace(data="spec.train_data"),
    "evaluation": _TRAINED._replace(data="spec.eval_data"),
    "feature extraction": _About(
        "spec.feature_extraction.data",
        "spec.model",
        "their vectors are those of special tokens alone",
    ),
    "measured": _About("", "spec.model", "they are measured anyway"),
}


@dataclass(frozen=True)
class DataStats:
    """Counts of one split: samples, their tokens, texts that were cut or are blank, tokens of text and unknown ones."""

    num_samples: int
    num_tokens: int
    num_cut: int
    num_words: int
    num_unknown: int
    num_blank: int = 0
    warns_itself: bool = False
    """Whether the task itself warns about cut samples, because they are not texts."""

    @property
    def cut_share(self) -> float:
        """The share of the texts that were cut."""
        return self.num_cut / max(self.num_samples, 1)

    @property
    def unknown_share(self) -> float:
        """The share of the tokens of text that are the unknown token."""
        return self.num_unknown / max(self.num_words, 1)

    def to_proto(self) -> plan_pb2.DataStats:
        """The statistics as the message of a plan."""
        return plan_pb2.DataStats(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            cut_share=self.cut_share,
            unknown_share=self.unknown_share,
        )


def loss_warnings(
    stats: DataStats, *, of: str, length: int, field: str, data_field: str = ""
) -> Iterator[job_pb2.Warning]:
    """Warnings about what a model will not see in the `of` data, whose texts `field` cuts to `length` tokens.

    `data_field` is where the spec names the data, if several tasks have such data.
    """
    about = _ABOUT[of]
    if stats.num_blank:
        message = (
            f"{stats.num_blank:,} of the {of} texts are blank, and {about.blank}; remove "
            "their rows, or map the column that has the texts"
        )
        yield job_pb2.Warning(reason="BLANK_TEXTS", message=message, field=data_field or about.data)
    if stats.cut_share > _MOST_CUT and not stats.warns_itself:
        message = (
            f"{stats.cut_share:.0%} of the {of} texts ({stats.num_cut:,}) are longer than {length:,} tokens, and the "
            "rest is cut; raise max_length as far as the model allows, or split the texts"
        )
        yield job_pb2.Warning(reason="TEXTS_CUT", message=message, field=field)
    if stats.unknown_share > _MOST_UNKNOWN:
        better = "take a model whose tokenizer knows the data's language and case"
        if about.tokenizer == _TRAINED.tokenizer:
            better = (
                "take the tokenizer that the model was trained with, or one for the data's language and case; for one "
                "that is trained here, raise vocab_size, or take byte_bpe, which knows every character"
            )
        message = (
            f"{stats.unknown_share:.0%} of the {of} data's tokens are the unknown token, so the model cannot see "
            f"what they are; {better}"
        )
        yield job_pb2.Warning(reason="UNKNOWN_TOKENS", message=message, field=about.tokenizer)


class TokenCounter:
    """Counts the tokens of text (no special tokens), and how many of them are unknown."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        unknown = tokenizer.unk_token_id
        framing = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        # GPT-2's unknown token is its end of text: its vocabulary has every byte, so nothing is unknown.
        self._unknown = -1 if unknown is None or unknown in framing else int(unknown)
        self._special = np.asarray(sorted({*tokenizer.all_special_ids} - {self._unknown}), np.int64)

    def count(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """For each sequence (none empty): tokens of text, and unknown ones, int32."""
        starts = np.cumsum([0, *(len(ids) for ids in sequences[:-1])])
        flat = np.fromiter((token for ids in sequences for token in ids), np.int64)
        words = np.add.reduceat((~np.isin(flat, self._special)).astype(np.int32), starts)
        return words, np.add.reduceat((flat == self._unknown).astype(np.int32), starts)

    def count_all(self, tokens: np.ndarray) -> tuple[int, int]:
        """For one part of a stream of tokens: tokens of text, and unknown ones."""
        words = unknown = 0
        for first in range(0, len(tokens), _PART):
            part = tokens[first : first + _PART]
            words += int((~np.isin(part, self._special)).sum())
            unknown += int((part == self._unknown).sum())
        return words, unknown
