"""Sources and targets, tokenised once; micro batches for an encoder and a decoder.

The decoder reads the target moved right by one position, after its start token; no ignored label ever reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore
from shardyard_trainer.data.text_pair_rows import PairNames, TextPair, read_pairs
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.loading import load_rows, token_writer
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models import architectures

IGNORED = -100
SEQUENCES_VERSION = 3
_BATCH_PAIRS = 512
_NOT_WRITTEN_WITH = frozenset(
    {
        *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"),
        *("max_length", "min_length", "num_return_sequences", "num_beam_groups", "diversity_penalty"),
    }
)
"""Settings of a folder's generation_config.json that fine-tuning drops: it evaluates by the likeliest text."""


@dataclass(frozen=True)
class SequenceInputs(TextInputs):
    """A tokenizer of an encoder-decoder; `writing` has the settings of generation_config.json that the task sets."""

    writing: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def refusal(config: Any) -> str:
        """Why a model of this configuration cannot write texts; empty if it can."""
        return architectures.seq2seq_refusal(config)

    def generation(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings for writing in evaluation and `Predict`: the task's, then the folder's."""
        kept = {name: value for name, value in settings.items() if name not in _NOT_WRITTEN_WITH}
        found = super().generation(config, kept)
        start = found.get("decoder_start_token_id", getattr(config, "decoder_start_token_id", None))
        if start is not None:
            found["decoder_start_token_id"] = start
        return found | dict(self.writing)


@dataclass(frozen=True)
class Lengths:
    """The most tokens of sources and targets."""

    source: int
    target: int


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that name the languages of sources and targets; None: the tokenizer's own, if it has one."""

    source: int | None = None
    target: int | None = None


class Marker:
    """Puts the token of a language into texts of at most `length` tokens; `token` None: leaves them as they are.

    `own` are the languages that it replaces.
    """

    def __init__(self, tokenizer: Any, token: int | None, length: int) -> None:
        self._token = token
        self.own = frozenset[int]() if token is None else language_ids(tokenizer)
        self._length = length

    def __call__(self, ids: list[int]) -> list[int]:
        """A text with its language: in the place of the tokenizer's own, else at its beginning."""
        token = self._token
        if token is None:
            return ids
        if any(each in self.own for each in ids):
            return [token if each in self.own else each for each in ids]
        return [token, *ids] if len(ids) < self._length else [token, *ids[: self._length - 2], ids[-1]]


def language_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that a tokenizer puts around every text besides the common ones: mBART's and NLLB's language."""
    roles = ("bos", "eos", "cls", "sep", "pad", "unk")
    return frozenset(tokenizer("", verbose=False)["input_ids"]) - {
        getattr(tokenizer, f"{role}_token_id") for role in roles
    }


@dataclass(frozen=True)
class Sequences:
    """Pairs of token sequences: 2 i is source i, 2 i + 1 its target.

    Arrays of the store, in the same order: `cut` (uint8), `words` and `unknown` tokens (int32), the texts as UTF-8 end
    to end in `text` (uint8), and where each ends (`text_ends`, int64).
    """

    store: TokenStore

    @property
    def num_pairs(self) -> int:
        """The number of pairs."""
        return self.store.num_sequences // 2

    def texts(self, pair: int) -> tuple[str, str]:
        """The source, without a prefix, and the target, as written in the data."""
        ends, text = self.store.arrays["text_ends"], self.store.arrays["text"]
        first, middle, last = (int(ends[2 * pair + at]) if 2 * pair + at >= 0 else 0 for at in (-1, 0, 1))
        return bytes(text[first:middle]).decode(), bytes(text[middle:last]).decode()


class PairTexts:
    """Sources after their prefix, and targets, for training a tokenizer; can be iterated any number of times."""

    def __init__(
        self, files: Sequence[DataFile], source: spec_pb2.DataSource, names: PairNames, *, prefix: str, field: str
    ) -> None:
        self._files = files
        self._source = source
        self._names = names
        self._prefix = prefix
        self._field = field

    def __iter__(self) -> Iterator[str]:
        for pair in read_pairs(self._files, self._source, self._names, field=self._field):
            yield self._prefix + pair.source
            yield pair.target


def load_sequences(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    names: PairNames,
    tokenizer: Any,
    *,
    lengths: Lengths,
    marks: Marks,
    prefix: str,
    cache_dir: Path,
    field: str,
) -> Sequences:
    """Reads, checks and tokenises a source once. Raises DataError."""
    store = load_rows(
        files,
        source,
        tokenizer,
        lambda bad: read_pairs(files, source, names, field=field, bad=bad),
        partial(_tokenise, tokenizer=tokenizer, lengths=lengths, marks=marks, prefix=prefix),
        cache=cache_dir / "sequences",
        field=field,
        version=SEQUENCES_VERSION,
        # Aligned files belong together by their names.
        file_names=[file.name for file in files],
        lengths=[lengths.source, lengths.target],
        marks=[marks.source, marks.target],
        prefix=prefix,
        names=[names.sources, names.targets, names.languages],
    )
    return Sequences(store)


def _tokenise(
    target: Path,
    rows: Iterator[TextPair],
    bad: BadRows,
    *,
    tokenizer: Any,
    lengths: Lengths,
    marks: Marks,
    prefix: str,
) -> None:
    writer = token_writer(target, tokenizer)
    counter = TokenCounter(tokenizer)
    mark_source = Marker(tokenizer, marks.source, lengths.source)
    mark_target = Marker(tokenizer, marks.target, lengths.target)
    num_pairs = num_bytes = 0
    while batch := list(islice(rows, _BATCH_PAIRS)):
        num_pairs += len(batch)
        sources = tokenization.encode(tokenizer, [prefix + pair.source for pair in batch], None, lengths.source)
        targets = tokenization.encode(tokenizer, [pair.target for pair in batch], None, lengths.target)
        ends = [_ended(ids, tokenizer, lengths.target, mark_target.own) for ids in targets.ids]
        sides = [mark_source(ids) for ids in sources.ids], [mark_target(ids) for ids, _ in ends]
        tokens = [ids for pair in zip(*sides, strict=True) for ids in pair]
        target_cut = [was or now for was, (_, now) in zip(targets.cut, ends, strict=True)]
        cut = [each for pair in zip(sources.cut, target_cut, strict=True) for each in pair]
        writer.add(tokens)
        writer.add_array("cut", np.asarray(cut, np.uint8))
        words, unknown = counter.count(tokens)
        writer.add_array("words", words)
        writer.add_array("unknown", unknown)
        texts = [text.encode() for pair in batch for text in (pair.source, pair.target)]
        ends_at = num_bytes + np.cumsum([len(text) for text in texts], dtype=np.int64)
        writer.add_array("text", np.frombuffer(b"".join(texts), np.uint8))
        writer.add_array("text_ends", ends_at)
        num_bytes = int(ends_at[-1])
    writer.finish(bad_rows=bad.note(num_pairs), unread=bad.unread())


def _ended(ids: list[int], tokenizer: Any, length: int, languages: frozenset[int]) -> tuple[list[int], bool]:
    """A target with its end token, which a language may follow, and whether that replaced another token."""
    end = end_of(tokenizer)
    if end is None or ids[-1] == end or (ids[-2:-1] == [end] and ids[-1] in languages):
        return ids, False
    return [*ids[: length - 1], end], len(ids) >= length


def end_of(tokenizer: Any) -> int | None:
    """The token that ends a text."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if found is None else int(found)


class SequenceSamples:
    """Pairs of one split, each side padded on the right to the longest of a micro batch.

    `padding` fills up ids, `start` is what the decoder reads first.
    """

    def __init__(self, data: Sequences, index: np.ndarray, *, padding: int, start: int) -> None:
        self._data = data
        self._index = index
        self._padding = padding
        self._start = start
        lengths = data.store.lengths().reshape(-1, 2)[index]
        self._lengths: np.ndarray = lengths.sum(1).astype(np.int32)
        self.longest = Lengths(*(int(each) for each in lengths.max(0))) if len(index) else Lengths(1, 1)
        self.num_samples = len(index)
        self.num_tokens = int(lengths.sum(dtype=np.int64))

    def lengths(self) -> np.ndarray:
        """The tokens of source and target together, int32."""
        return self._lengths

    def digests(self) -> np.ndarray:
        """A hash of each source, uint64."""
        return self._data.store.digests(2 * self._index)

    def texts(self, sample: int) -> tuple[str, str]:
        """The source, without a prefix, and the target, as written in the data."""
        return self._data.texts(int(self._index[sample]))

    def num_cut(self) -> tuple[int, int]:
        """The numbers of cut sources and of cut targets."""
        sources, targets = self._data.store.arrays["cut"].reshape(-1, 2)[self._index].sum(0, dtype=np.int64)
        return int(sources), int(targets)

    def stats(self) -> DataStats:
        """Statistics of the samples; the task itself warns about what is cut."""
        arrays = self._data.store.arrays
        cut, words, unknown = (arrays[name].reshape(-1, 2)[self._index] for name in ("cut", "words", "unknown"))
        return DataStats(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_cut=int(cut.any(1).sum()),
            num_words=int(words.sum(dtype=np.int64)),
            num_unknown=int(unknown.sum(dtype=np.int64)),
            warns_itself=True,
        )

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `attention_mask` [B, S], `decoder_input_ids` and `labels` [B, T]."""
        chosen = [sample.sample for sample in samples]
        tokens, offsets = self._data.store.tokens, self._data.store.offsets
        pairs = [
            [np.asarray(tokens[offsets[at] : offsets[at + 1]], np.int64) for at in (2 * row, 2 * row + 1)]
            for row in self._index[chosen].tolist()
        ]
        return sequence_batch(pairs, padding=self._padding, start=self._start, samples=tuple(chosen))


def sequence_batch(
    pairs: Sequence[Sequence[np.ndarray]], *, padding: int, start: int, samples: tuple[int, ...] = ()
) -> MicroBatch:
    """Pairs of source and target tokens as tensors: the inputs of encoder and decoder, and the labels."""
    width, height = (max(1, *(len(pair[side]) for pair in pairs)) for side in (0, 1))
    ids, mask = np.full((len(pairs), width), padding), np.zeros((len(pairs), width), np.int64)
    read, labels = np.full((len(pairs), height), padding), np.full((len(pairs), height), IGNORED)
    for row, (source, target) in enumerate(pairs):
        ids[row, : len(source)], mask[row, : len(source)] = source, 1
        labels[row, : len(target)] = target
        # Moved right by one: after the target the decoder reads padding, from which no label is predicted.
        read[row, 0], read[row, 1 : len(target)] = start, target[:-1]
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "decoder_input_ids": torch.from_numpy(read),
        "labels": torch.from_numpy(labels),
    }
    num_units = int((labels != IGNORED).sum())
    return MicroBatch(inputs, num_units, int(mask.sum()) + num_units, ids.size + labels.size, samples)
