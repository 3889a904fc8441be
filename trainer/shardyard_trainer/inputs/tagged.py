"""Tagged words, tokenised once: windows of every text on disk, with the label of each word at its first token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.budget import in_use, tokenised
from shardyard_trainer.data.columns import layout_key
from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.labels import check_amount
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore, files_fingerprint, fingerprint_of
from shardyard_trainer.data.tagged_rows import TaggedText, read_tagged
from shardyard_trainer.data.tags import SchemeFinder, labels_of, to_bio
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.base import MicroBatch, SampleRef, sum_of
from shardyard_trainer.inputs.holdout import split_by_lot
from shardyard_trainer.inputs.loading import token_writer
from shardyard_trainer.inputs.words import WordCutter

IGNORED = -100
TAGGED_VERSION = 4
_BATCH_TEXTS = 256


@dataclass(frozen=True)
class TagWish:
    """A spec's settings for tags: the scheme (empty: detected), and labels by class id (empty: those of the data)."""

    scheme: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaggedTexts:
    """Windows of texts.

    Arrays of the store: a token's `types`, `labels` (of a word's first token, else IGNORED) and `owned` (uint8, 1 for
    the tokens of words that this window answers for); a window's `texts` (int64), `counted` and `unknown` tokens.
    """

    store: TokenStore
    labels: tuple[str, ...]
    scheme: str
    num_texts: int


class TaggedWords:
    """The texts of a source with single spaces between words; can be iterated any number of times."""

    def __init__(self, files: Sequence[DataFile], source: spec_pb2.DataSource, names: Sequence[str]) -> None:
        self._files = files
        self._source = source
        self._names = names

    def __iter__(self) -> Iterator[str]:
        texts = read_tagged(self._files, self._source, names=self._names, field="spec.train_data")
        return (" ".join(text.words) for text in texts)


def load_tagged(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: Any,
    *,
    length: int,
    overlap: int,
    wish: TagWish,
    cache_dir: Path,
    field: str,
) -> TaggedTexts:
    """Reads, checks and tokenises a source once. Raises DataError."""
    key = {
        "version": TAGGED_VERSION,
        "files": files_fingerprint(files, field=field),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "window": [length, overlap],
        "layout": layout_key(source),
        "wish": [wish.scheme, *wish.labels],
    }
    if (planned := _planned(cache_dir, key, wish)) is not None:
        return planned

    def build(target: Path) -> None:
        finder, num_tags, num_texts, bad = SchemeFinder(), 0, 0, BadRows(source)
        # Check all rows before tokenising any, so that an error in the last row is reported early.
        for text in read_tagged(files, source, names=wish.labels, field=field, bad=bad):
            finder.add(text.tags, text.file, text.line)
            num_tags += len(text.tags)
            num_texts += 1
        bad.finish(num_texts, field)
        if not num_tags:
            raise DataError("no row has a word with a tag", field=field)
        try:
            scheme = finder.find(wish.scheme)
            check_amount(finder.seen, "map the column of tags in columns.tags", "shorten them")
        except DataError as error:
            raise error.at(field) from None
        labels = labels_of({*finder.seen, *wish.labels}, scheme)
        # Given labels keep their order: it is that of a head's outputs.
        given = [label for label in wish.labels if label in labels]
        known = (*given, *(label for label in labels if label not in given))
        if len(known) < 2:
            message = (
                f"all words have the tag {shorten(known[0])!r}; map the column of tags in columns.tags (in a CoNLL "
                "file: column_1, column_2 …)"
            )
            raise DataError(message, field=field)
        rows = read_tagged(files, source, names=wish.labels, field=field)
        about = {"scheme": scheme, "bad_rows": bad.note(num_texts)}
        _tokenise(
            rows, WordCutter(tokenizer, length, overlap), tokenizer, target, labels=known, about=about, field=field
        )

    return _opened(tokenised(_folder(cache_dir, key), build))


def _planned(cache_dir: Path, key: Mapping[str, Any], wish: TagWish) -> TaggedTexts | None:
    """The same texts if a plan left them in the cache; it detected the scheme, and the labels if none were given."""
    for labels in dict.fromkeys((wish.labels, ())) if wish.scheme else ():
        folder = _folder(cache_dir, {**key, "wish": ["", *labels]})
        if in_use(folder):
            found = _opened(folder)
            if found.scheme == wish.scheme and wish.labels in (labels, found.labels):
                return found
    return None


def _folder(cache_dir: Path, key: Mapping[str, Any]) -> Path:
    return cache_dir / "tagged" / fingerprint_of(key)


def _opened(folder: Path) -> TaggedTexts:
    store = TokenStore.open(folder)
    meta = store.meta
    return TaggedTexts(store, tuple(meta["labels"]), str(meta["scheme"]), int(meta["num_texts"]))


def _tokenise(
    rows: Iterator[TaggedText],
    cutter: WordCutter,
    tokenizer: Any,
    target: Path,
    *,
    labels: Sequence[str],
    about: Mapping[str, str],
    field: str,
) -> None:
    writer = token_writer(target, tokenizer)
    counter = TokenCounter(tokenizer)
    ids = {label: at for at, label in enumerate(labels)}
    num_texts = num_windows = 0
    while batch := list(islice(rows, _BATCH_TEXTS)):
        windows, of, tags, owned = [], [], [], []
        for text in batch:
            found = [ids[tag] for tag in to_bio(text.tags, about["scheme"])]
            for window in cutter.cut(text.words):
                # A window that answers for no word has nothing to be learnt or evaluated.
                if not any(window.firsts):
                    continue
                windows.append(window)
                owned += [word >= 0 for word in window.words]
                of.append(num_texts)
                tags += [
                    found[word] if first else IGNORED for word, first in zip(window.words, window.firsts, strict=True)
                ]
            num_texts += 1
        if not windows:
            continue
        num_windows += len(windows)
        tokens = [window.ids for window in windows]
        writer.add(tokens)
        writer.add_array("types", np.fromiter((t for window in windows for t in window.type_ids), np.uint8))
        writer.add_array("labels", np.asarray(tags, np.int32))
        writer.add_array("owned", np.asarray(owned, np.uint8))
        writer.add_array("texts", np.asarray(of, np.int64))
        words, unknown = counter.count(tokens)
        writer.add_array("counted", words)
        writer.add_array("unknown", unknown)
    if not num_windows:
        raise DataError("no word has a token; give texts that the tokenizer knows", field=field)
    writer.finish(labels=list(labels), num_texts=num_texts, **about)


class TaggedSamples:
    """The windows of some texts, padded on the right to the longest of a micro batch.

    `inside` has for each label that of a word's later tokens, if those are learnt too; `weights` are the labels' own.
    """

    inside: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __init__(self, data: TaggedTexts, texts: np.ndarray, *, with_types: bool, padding: int) -> None:
        store = data.store
        self.data = data
        self._index = np.flatnonzero(np.isin(store.arrays["texts"], texts))
        self._with_types = with_types
        self._padding = padding
        self._lengths: np.ndarray = store.lengths()[self._index]
        self.num_samples = len(self._index)
        self.num_tokens = int(self._lengths.sum())

    def lengths(self) -> np.ndarray:
        """The length of each window in tokens, int32."""
        return self._lengths

    def text_of(self, samples: np.ndarray) -> np.ndarray:
        """The text of each window, int64."""
        return np.asarray(self.data.store.arrays["texts"][self._index[samples]])

    def digests(self) -> np.ndarray:
        """A hash of each window, uint64."""
        return self.data.store.digests(self._index)

    def counts(self) -> np.ndarray:
        """The number of tokens of each label that are trained on, int64 [C]."""
        total = np.zeros(len(self.data.labels), np.int64)
        for row in self._index.tolist():
            labels = self._labels(row)
            total += np.bincount(labels[labels != IGNORED], minlength=len(total))
        return total

    def stats(self) -> DataStats:
        """Statistics of the windows; nothing is cut."""
        arrays = self.data.store.arrays
        return DataStats(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_cut=0,
            num_words=int(arrays["counted"][self._index].sum(dtype=np.int64)),
            num_unknown=int(arrays["unknown"][self._index].sum(dtype=np.int64)),
        )

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids`, `attention_mask`, `labels` [B, T], and for models that have them `token_type_ids`."""
        store = self.data.store
        chosen = [sample.sample for sample in samples]
        rows, lengths = self._index[chosen], self._lengths[chosen]
        shape = (len(rows), int(lengths.max()))
        ids, mask, types = np.full(shape, self._padding), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            part = slice(store.offsets[row], store.offsets[row] + length)
            ids[i, :length], types[i, :length] = store.tokens[part], store.arrays["types"][part]
            labels[i, :length], mask[i, :length] = self._labels(row), 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
        if self._with_types:
            inputs["token_type_ids"] = torch.from_numpy(types)
        num_units = sum_of(self.weights, labels[labels != IGNORED])
        return MicroBatch(inputs, num_units, int(lengths.sum()), ids.size, tuple(chosen))

    def _labels(self, row: int) -> np.ndarray:
        """The labels of a window's tokens."""
        store = self.data.store
        part = slice(store.offsets[row], store.offsets[row + 1])
        labels: np.ndarray = store.arrays["labels"][part]
        if self.inside is None:
            return labels
        is_first = labels != IGNORED
        later = (store.arrays["owned"][part] > 0) & ~is_first
        last_first = np.maximum.accumulate(np.where(is_first, np.arange(len(labels)), 0))
        filled = labels.copy()
        filled[later] = self.inside[labels[last_first[later]]]
        return filled


def split_texts(data: TaggedTexts, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts to train on and to evaluate on, by lot. Raises DataError if none is left to train on."""
    texts = np.unique(data.store.arrays["texts"])  # Texts without words are in no window.
    train, held_out = split_by_lot(len(texts), holdout, seed)
    return texts[train], texts[held_out]
