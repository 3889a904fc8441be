"""Texts whose vectors are learnt, tokenised once; micro batches of all texts of each sample.

Shape suffixes: B samples, K texts of a sample, T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.sentence_rows import ScoreRange, SentenceRow, read_sentences
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.loading import load_rows, token_writer
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models import architectures
from shardyard_trainer.models.folder import TORCH_HUB_TYPES

SENTENCES_VERSION = 3
ABSENT = -1
"""The key in the place of a negative that a sample lacks and others have."""

_BATCH_ROWS = 512
_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
"""Names of the poolings in the files of sentence-transformers."""


@dataclass(frozen=True)
class SentenceInputs(TextInputs):
    """A tokenizer, and how the vectors of its texts are pooled; saved so that sentence-transformers reads it too."""

    pooling: str = ""

    def save(self, folder: Path, config: Any) -> None:
        """Writes the tokenizer's files, and those that name the parts of a sentence-transformers model."""
        super().save(folder, config)
        if config.model_type in TORCH_HUB_TYPES:
            return  # Sentence-transformers loads classes of transformers alone.
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for at, (path, kind) in enumerate(kinds.items())
        ]
        pooling = {f"pooling_mode_{flag}": name == self.pooling for name, flag in _FLAGS.items()}
        (folder / "1_Pooling").mkdir()
        for name, content in {
            "modules.json": modules,
            "sentence_bert_config.json": {"max_seq_length": self.length, "do_lower_case": False},
            "1_Pooling/config.json": {"word_embedding_dimension": architectures.width(config), **pooling},
        }.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Sentences:
    """Samples of K texts each: text j of sample i is sequence K i + j.

    Arrays of the store, in the order of the sequences: `cut` (uint8), `words` and `unknown` tokens (int32), `keys`
    (int64, the same for texts of the same tokens; ABSENT for a negative that is not there). In the order of the
    samples: `scores` (float64, as written), empty if there are none; `range` says what they mean.
    """

    store: TokenStore
    range: ScoreRange

    @property
    def num_texts(self) -> int:
        """The texts of a sample: two, and the negatives."""
        return int(self.store.meta["num_texts"])

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return self.store.num_sequences // self.num_texts

    @cached_property
    def cosines(self) -> np.ndarray | None:
        """The cosine that each pair is to have, float32; None for pairs without scores, and for triplets."""
        return self.range.cosines(np.asarray(self.store.arrays["scores"])) if self.store.meta["scored"] else None

    @property
    def keys(self) -> np.ndarray:
        """The keys of the texts, int64 [samples, K]."""
        return np.asarray(self.store.arrays["keys"]).reshape(-1, self.num_texts)


class AllTexts:
    """Every text of a source, for training a tokenizer; can be iterated any number of times."""

    def __init__(
        self, files: Sequence[DataFile], source: spec_pb2.DataSource, scores: ScoreRange, *, field: str
    ) -> None:
        self._files = files
        self._source = source
        self._scores = scores
        self._field = field

    def __iter__(self) -> Iterator[str]:
        for row in read_sentences(self._files, self._source, self._scores, field=self._field):
            for texts in row.samples:
                yield from texts


def load_sentences(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    scores: ScoreRange,
    tokenizer: Any,
    *,
    max_length: int,
    cache_dir: Path,
    field: str,
) -> Sentences:
    """Reads, checks and tokenises a source once. Raises DataError."""
    num_texts = 2

    def read(bad: BadRows) -> Iterator[SentenceRow]:
        nonlocal num_texts
        for row in read_sentences(files, source, scores, field=field, bad=bad):
            num_texts = max(num_texts, len(row.samples[0]))
            yield row

    def write(target: Path, rows: Iterator[SentenceRow], bad: BadRows) -> None:
        # All rows have been read once: the most texts of a sample are known.
        _tokenise(target, rows, bad, tokenizer=tokenizer, num_texts=num_texts, max_length=max_length)

    store = load_rows(
        files,
        source,
        tokenizer,
        read,
        write,
        cache=cache_dir / "sentences",
        field=field,
        version=SENTENCES_VERSION,
        max_length=max_length,
        scores=[scores.lowest, scores.highest, scores.is_open],
    )
    return Sentences(store, scores)


def _tokenise(
    target: Path, rows: Iterator[SentenceRow], bad: BadRows, *, tokenizer: Any, num_texts: int, max_length: int
) -> None:
    """Writes the samples of all rows, each of `num_texts` texts."""
    writer = token_writer(target, tokenizer)
    counter = TokenCounter(tokenizer)
    num_rows, scored = 0, False
    while batch := list(islice(rows, _BATCH_ROWS)):
        num_rows += len(batch)
        scored = batch[0].score is not None
        samples = [texts for row in batch for texts in row.samples]
        texts = [text for given in samples for text in (*given, *[None] * (num_texts - len(given)))]
        encoded = tokenization.encode(tokenizer, [text or "" for text in texts], None, max_length)
        writer.add(encoded.ids)
        writer.add_array("cut", np.asarray(encoded.cut, np.uint8))
        words, unknown = counter.count(encoded.ids)
        writer.add_array("words", words)
        writer.add_array("unknown", unknown)
        keys = [ABSENT if text is None else _key(ids) for text, ids in zip(texts, encoded.ids, strict=True)]
        writer.add_array("keys", np.asarray(keys, np.int64))
        writer.add_array("scores", np.asarray([row.score for row in batch if row.score is not None], np.float64))
    writer.finish(num_texts=num_texts, scored=scored, bad_rows=bad.note(num_rows))


def _key(ids: Sequence[int]) -> int:
    """The same number for the same tokens: such texts have the same vector."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, "<u4").tobytes(), digest_size=8).digest(), "little") >> 1


class SentenceSamples:
    """Pairs or triplets of one split. A sample counts as long as its longest text, once for each of its texts."""

    def __init__(self, data: Sentences, index: np.ndarray, *, with_types: bool, padding: int) -> None:
        self._data = data
        self._index = index
        self._with_types = with_types
        self._padding = padding
        lengths_BK = data.store.lengths().reshape(-1, data.num_texts)[index]
        # All texts of a micro batch are padded to the longest: these are the positions that a sample takes.
        self._lengths: np.ndarray = (lengths_BK.max(1, initial=1) * data.num_texts).astype(np.int32)
        self.num_samples = len(index)
        self.num_tokens = int(lengths_BK.sum(dtype=np.int64))

    @property
    def is_scored(self) -> bool:
        """Whether each pair has a score."""
        return self._data.cosines is not None

    @property
    def has_negatives(self) -> bool:
        """Whether samples have negatives of their own."""
        return self._data.num_texts > 2

    @property
    def keys(self) -> np.ndarray:
        """The keys of the texts, int64 [samples, K]."""
        return np.asarray(self._data.keys[self._index])

    def lengths(self) -> np.ndarray:
        """The positions of each sample, int32."""
        return self._lengths

    def stats(self) -> DataStats:
        """Statistics of the samples; one is cut if any of its texts is."""
        arrays, num_texts = self._data.store.arrays, self._data.num_texts
        cut, words, unknown = (arrays[name].reshape(-1, num_texts)[self._index] for name in ("cut", "words", "unknown"))
        return DataStats(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_cut=int(cut.any(1).sum()),
            num_words=int(words.sum(dtype=np.int64)),
            num_unknown=int(unknown.sum(dtype=np.int64)),
        )

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `attention_mask` [B · K, T], a sample's texts one after the other; `keys` [B, K].

        For models that distinguish the texts of a pair also `token_type_ids`, all 0; with scores `cosines` [B].
        """
        store, num_texts = self._data.store, self._data.num_texts
        chosen = [sample.sample for sample in samples]
        rows = self._index[chosen]
        texts = (rows[:, None] * num_texts + np.arange(num_texts)).reshape(-1)
        lengths = (store.offsets[texts + 1] - store.offsets[texts]).astype(np.int64)
        shape = (len(texts), int(lengths.max()))
        ids, mask = np.full(shape, self._padding, np.int64), np.zeros(shape, np.int64)
        for at, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            ids[at, :length] = store.tokens[store.offsets[text] : store.offsets[text] + length]
            mask[at, :length] = 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "keys": torch.from_numpy(self._data.keys[rows]),
        }
        if self._with_types:
            inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        if self._data.cosines is not None:
            inputs["cosines"] = torch.from_numpy(self._data.cosines[rows])
        return MicroBatch(inputs, len(rows), int(lengths.sum()), ids.size, tuple(chosen))
