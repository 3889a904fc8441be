"""Labelled texts, tokenised once: tokens, types and labels on disk, each row checked on the way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import REASON, BadRows
from shardyard_trainer.data.budget import in_use, tokenised
from shardyard_trainer.data.columns import LABEL_COLUMNS_FIELD, Row, layout_key, read_rows
from shardyard_trainer.data.errors import DataError, listed
from shardyard_trainer.data.label_column import LabelColumn, Labels, Wanted
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelSchema
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import (
    TokenStore,
    TokenWriter,
    files_fingerprint,
    fingerprint_of,
)
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.base import MicroBatch, SampleRef, sum_of
from shardyard_trainer.inputs.holdout import by_lot
from shardyard_trainer.inputs.loading import token_writer

EXAMPLES_VERSION = 5
BATCH_TEXTS = 512


class Examples(NamedTuple):
    """Labelled texts, and what their labels mean.

    Arrays of the store: `types` (uint8, a type id for each token); for each text `cut` (uint8, 1 if it was longer),
    `words` and `unknown` (int32, its tokens except special ones, and those of them that the tokenizer does not
    know); and `labels`: the class of each text (int64), its number (float64), or for several labels 0 or 1 for each
    class (uint8 [texts · classes]).
    """

    store: TokenStore
    schema: LabelSchema

    @property
    def has_pairs(self) -> bool:
        """Whether each example is a pair of texts."""
        return bool(self.store.meta["has_pairs"])

    @property
    def label_notes(self) -> list[tuple[str, str]]:
        """Warnings, as (reason, message)."""
        return [(reason, message) for reason, message in self.store.meta["label_notes"]]

    @property
    def label_way(self) -> str:
        """How the labels were read, for `Wanted.like`."""
        return str(self.store.meta["label_way"])

    def stats(self, index: np.ndarray) -> DataStats:
        """Statistics of some of the texts."""
        arrays = self.store.arrays
        return DataStats(
            num_samples=len(index),
            num_tokens=int(self.store.lengths()[index].sum()),
            num_cut=int(arrays["cut"][index].sum()),
            num_words=int(arrays["words"][index].sum(dtype=np.int64)),
            num_unknown=int(arrays["unknown"][index].sum(dtype=np.int64)),
            num_blank=int((arrays["words"][index] == 0).sum()),
        )


def load_examples(
    files: list[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    wanted: Wanted,
    cache_dir: Path,
    field: str = "spec.train_data",
) -> Examples:
    """Reads, checks and tokenises a source once. Raises DataError, SpecError."""
    key = {
        "version": EXAMPLES_VERSION,
        "files": files_fingerprint(files, field=field),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "max_length": max_length,
        "layout": layout_key(source),
        **wanted._asdict(),
    }
    # If the spec gave no labels, the plan found these and left its tokens in the cache; they are used again.
    found = cache_dir / "examples" / fingerprint_of({**key, "labels": ()})
    if wanted.labels and in_use(found):
        store = TokenStore.open(found)
        if tuple(store.meta["labels"]) == wanted.labels:
            return Examples(store, LabelSchema(wanted.problem, wanted.labels))

    def rows(bad: BadRows) -> Iterator[Row]:
        return read_rows(
            files,
            source,
            with_label=True,
            several_labels=wanted.takes_several,
            label_columns=wanted.columns,
            field=field,
            bad=bad,
        )

    def build(target: Path) -> None:
        try:
            # Check all rows before tokenising any, which takes ten times as long: an error in the last row shows early.
            bad = BadRows(source)
            checked = _check(rows(bad), LabelColumn(wanted), bad, field)
            good = (row for row in rows(BadRows(source)) if (row.file, row.line) not in bad.places)
            _tokenise(good, checked, tokenizer, target, max_length=max_length)
        except DataError as error:
            # Errors found while rows are combined are reported for the source that the rows came from.
            raise (error if error.field.startswith((field, LABEL_COLUMNS_FIELD)) else error.at(field)) from None

    folder = cache_dir / "examples" / fingerprint_of(key)
    store = TokenStore.open(tokenised(folder, build))
    return Examples(store, LabelSchema(wanted.problem, tuple(store.meta["labels"])))


class _Checked(NamedTuple):
    """The results of a first reading of all rows."""

    labels: Labels
    num_rows: int
    has_pairs: bool
    bad_rows: str


def _check(rows: Iterator[Row], column: LabelColumn, bad: BadRows, field: str) -> _Checked:
    num_rows, has_pairs = 0, False
    for row in rows:
        try:
            column.add(row)
        except DataError as error:
            bad.skip(error)
            continue
        if num_rows and has_pairs != (row.text_pair is not None):
            message = "some files have a second text and others none; give all one, or map none in columns.text_pair"
            raise DataError(message, file=row.file, line=row.line)
        has_pairs = row.text_pair is not None
        num_rows += 1
    bad.finish(num_rows, field)
    return _Checked(column.finish(), num_rows, has_pairs, bad.note(num_rows))


def _tokenise(
    rows: Iterator[Row], checked: _Checked, tokenizer: PreTrainedTokenizerFast, target: Path, *, max_length: int
) -> None:
    writer = token_writer(target, tokenizer)
    counter = TokenCounter(tokenizer)
    num_rows = 0
    while batch := list(islice(rows, BATCH_TEXTS)):
        num_rows += len(batch)
        pairs = [row.text_pair or "" for row in batch] if checked.has_pairs else None
        write_texts(writer, counter, tokenization.encode(tokenizer, [row.text for row in batch], pairs, max_length))
    if num_rows != checked.num_rows:
        raise DataError(
            f"{checked.num_rows:,} rows when they were checked and {num_rows:,} when they were tokenised: the files "
            "change while they are read; submit again when nothing writes to them"
        )
    found = checked.labels
    writer.add_array("labels", found.array)
    notes = [*found.notes, *([(REASON, checked.bad_rows)] if checked.bad_rows else [])]
    writer.finish(labels=found.schema.labels, has_pairs=checked.has_pairs, label_notes=notes, label_way=found.way)


def write_texts(writer: TokenWriter, counter: TokenCounter, encoded: tokenization.Encoded) -> None:
    """Writes tokenised texts or pairs with the arrays that `Examples` has of each, but for the labels."""
    writer.add(encoded.ids)
    writer.add_array("types", np.fromiter((t for types in encoded.types for t in types), np.uint8))
    writer.add_array("cut", np.asarray(encoded.cut, np.uint8))
    words, unknown = counter.count(encoded.ids)
    writer.add_array("words", words)
    writer.add_array("unknown", unknown)


class ClassificationSamples:
    """Texts of one split, padded on the right to the longest of a micro batch; `weights` are those of the classes."""

    weights: np.ndarray | None = None

    def __init__(self, examples: Examples, index: np.ndarray, *, with_types: bool, padding: int) -> None:
        self._examples = examples
        self._index = index
        self._with_types = with_types
        self._padding = padding
        self._lengths: np.ndarray = examples.store.lengths()[index]
        self.num_samples = len(index)
        self.num_tokens = int(self._lengths.sum())

    def lengths(self) -> np.ndarray:
        """The length of each text in tokens, int32."""
        return self._lengths

    def stats(self) -> DataStats:
        """Statistics of these texts."""
        return self._examples.stats(self._index)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids`, `attention_mask`, `labels`, and `token_type_ids` for models that distinguish texts of a pair."""
        store = self._examples.store
        rows = self._index[[sample.sample for sample in samples]]
        lengths = self._lengths[[sample.sample for sample in samples]]
        shape = (len(rows), int(lengths.max()))
        ids, mask, types = np.full(shape, self._padding), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            part = slice(store.offsets[row], store.offsets[row] + length)
            ids[i, :length] = store.tokens[part]
            types[i, :length] = store.arrays["types"][part]
            mask[i, :length] = 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(self._labels(rows)),
        }
        if self._with_types:
            inputs["token_type_ids"] = torch.from_numpy(types)
        num_units = len(rows) if self.weights is None else sum_of(self.weights, inputs["labels"].numpy())
        return MicroBatch(inputs, num_units, int(lengths.sum()), ids.size)

    def counts(self) -> np.ndarray:
        """The number of texts of each class, int64 [C]; empty for numbers."""
        return counts_of(self._labels(self._index), self._examples.schema)

    def digests(self) -> np.ndarray:
        """A hash of each text or pair, uint64."""
        return self._examples.store.digests(self._index)

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        labels: np.ndarray = self._examples.store.arrays["labels"]
        schema = self._examples.schema
        if schema.problem == MULTI_LABEL:
            return np.asarray(labels.reshape(-1, len(schema.labels))[rows], np.float32)
        return np.asarray(labels[rows], np.float32 if schema.problem == REGRESSION else np.int64)


def counts_of(labels: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """The number of samples of each class, int64 [C]; empty for numbers."""
    if schema.problem == REGRESSION:
        return np.zeros(0, np.int64)
    if schema.problem == MULTI_LABEL:
        return np.asarray(labels.sum(0), np.int64)
    return np.bincount(labels, minlength=len(schema.labels))


class Labelled(Protocol):
    """Samples with labels, such as `Examples`."""

    @property
    def store(self) -> TokenStore:
        """One sequence for each sample, and the array `labels`."""

    @property
    def schema(self) -> LabelSchema:
        """The problem and the classes of the labels."""


def hold_out(examples: Labelled, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """The samples to train on, those to evaluate on, and what to warn of. Raises DataError if none is left to train."""
    train, held_out = by_lot(examples.store.num_sequences, holdout, seed)
    warning = ""
    if examples.schema.problem == SINGLE_LABEL:
        train, held_out, warning = _keep_classes(train, held_out, examples)
    return np.sort(train), np.sort(held_out), warning


def _keep_classes(train: np.ndarray, held_out: np.ndarray, examples: Labelled) -> tuple[np.ndarray, np.ndarray, str]:
    """Moves one sample back to training for each class whose samples were all held out."""
    labels: np.ndarray = examples.store.arrays["labels"]
    lost = np.setdiff1d(labels[held_out], labels[train])
    if not len(lost):
        return train, held_out, ""
    back = np.asarray([held_out[labels[held_out] == label][0] for label in lost])
    left = np.setdiff1d(held_out, back)
    names = [examples.schema.labels[label] for label in lost]
    message = f"{len(back)} samples stay in training, as no other has their labels: {listed(names, most=8)}"
    if not len(left):
        message += "; nothing is left to evaluate on: give more data, or eval_data"
    return np.concatenate([train, back]), left, message
