"""Packed texts with spans of tokens removed: the encoder reads a sentinel for each, the decoder writes the spans.

Spans are drawn as for T5 (Raffel et al., 2020), newly in every pass from (seed, pass, sample). Sentinels are looked up
by their names, `<extra_id_0>` first: in T5's vocabulary their numbers run down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.packed import Blocks, Corpus, Frame, corpus_stats
from shardyard_trainer.inputs.sequences import end_of, sequence_batch

NUM_SENTINELS = 100
"""The number of sentinels, as in T5."""

_STREAM_TRAIN, _STREAM_EVAL = 0x7A, 0x7E


def sentinel(number: int) -> str:
    """The text of a sentinel token, such as `<extra_id_0>`."""
    return f"<extra_id_{number}>"


def span_frame(tokenizer: Any) -> Frame:
    """The token that ends each document."""
    end = end_of(tokenizer)
    return Frame((), () if end is None else (end,))


def num_spans(length: int, density: float, mean_length: float) -> tuple[int, int]:
    """The numbers of removed tokens and of spans for a length; both 0 for a single token."""
    if length < 2:
        return 0, 0
    taken = min(max(round(length * density), 1), length - 1)
    return taken, min(max(round(taken / mean_length), 1), taken, length - taken)


def sentinel_ids(tokenizer: Any, number: int, *, length: int) -> np.ndarray:
    """The ids of the first sentinels. Raises SpecError if the vocabulary lacks one."""
    vocab = tokenizer.get_vocab()
    missing = next((name for name in map(sentinel, range(number)) if name not in vocab), None)
    if missing is not None:
        there = sum(sentinel(at) in vocab for at in range(number))
        raise SpecError(
            "spec.tokenizer",
            "OBJECTIVE_UNSUPPORTED",
            f"sequences of {length:,} tokens have {number} spans, but of the sentinels the tokenizer has {there}: "
            f"{shorten(missing)} is missing; use T5's tokenizer or one that is trained here (train), which have "
            f"{NUM_SENTINELS}, or a smaller sequence_length",
        )
    return np.asarray([vocab[sentinel(at)] for at in range(number)], np.int64)


class SpanSamples:
    """Packed sequences of one split with spans removed. Documents of a sequence attend to one another, as in T5."""

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        *,
        seed: int,
        is_train: bool,
        tokenizer: Any,
        spans: tuple[float, float],
        start: int,
    ) -> None:
        self.corpus = corpus
        self.blocks = Blocks(corpus, length, seed=seed, shuffle=is_train, overlap=0)
        self._density, self._mean_length = spans
        self._counter = TokenCounter(tokenizer)
        self._seed = (seed, _STREAM_TRAIN if is_train else _STREAM_EVAL)
        self._sentinels = sentinel_ids(tokenizer, num_spans(length, *spans)[1], length=length)
        self._end = np.asarray([end_of(tokenizer)], np.int64)
        self._padding = int(tokenizer.pad_token_id or 0)
        self._start = start
        self.num_samples = self.blocks.num_blocks
        self.num_tokens = self.num_samples * length if is_train else corpus.num_tokens

    def lengths(self) -> None:
        """All sequences have the same length, except the last evaluation sequence."""
        return

    def stats(self) -> DataStats:
        """Statistics of the corpus."""
        return corpus_stats(self.corpus, self.blocks, self._counter, num_tokens=self.num_tokens)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `attention_mask` [B, S], `decoder_input_ids` and `labels` [B, T]."""
        pairs = [self._taken_out(sample) for sample in samples]
        return sequence_batch(pairs, padding=self._padding, start=self._start)

    def _taken_out(self, sample: SampleRef) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's input and the decoder's target, each with the end token; empty if there is no span."""
        places, _ = self.blocks.block(sample.data_epoch, sample.sample)
        tokens = np.asarray(self.corpus.tokens[places], np.int64)
        taken, number = num_spans(len(tokens), self._density, self._mean_length)
        if not number:
            return np.concatenate([tokens, self._end]), np.zeros(0, np.int64)
        random = np.random.default_rng([*self._seed, sample.data_epoch, sample.sample])
        kept = _parts(len(tokens) - taken, number, random)
        gone = _parts(taken, number, random)
        ends = np.cumsum(np.stack([kept, gone], 1).ravel())
        source, target, first = [], [], 0
        for at, (middle, last) in enumerate(ends.reshape(-1, 2).tolist()):
            mark = self._sentinels[at : at + 1]
            source += [tokens[first:middle], mark]
            target += [mark, tokens[middle:last]]
            first = last
        return np.concatenate([*source, self._end]), np.concatenate([*target, self._end])


def _parts(total: int, number: int, random: np.random.Generator) -> np.ndarray:
    """Cuts `total` into this many parts of at least 1, all cuts equally likely, int64 [number]."""
    cuts = np.sort(random.permutation(total - 1)[: number - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
