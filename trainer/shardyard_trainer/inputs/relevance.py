"""Pairs of queries and passages, tokenised once: a sample is a pair, and knows its query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, LabelSchema
from shardyard_trainer.data.relevance_rows import Judged, read_relevance
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import TokenCounter
from shardyard_trainer.data.store import TokenStore
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.holdout import by_lot
from shardyard_trainer.inputs.labelled import BATCH_TEXTS, ClassificationSamples, Examples, write_texts
from shardyard_trainer.inputs.loading import load_rows, token_writer

RELEVANCE_VERSION = 1
RELEVANT = 0.5
"""The least label of a relevant passage."""

BINARY = LabelSchema(MULTI_LABEL, ("relevant",))
"""One output for each pair, the logit of being relevant."""

GRADED = LabelSchema(REGRESSION, ())


def load_relevance(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: Any,
    *,
    length: int,
    cache_dir: Path,
    field: str,
) -> TokenStore:
    """Reads, checks and tokenises a source once: a sequence for each pair. Raises DataError.

    Beside the arrays of `Examples`, the store has `labels` (float64) and `queries` (int64): the number of the query,
    the same for all pairs of its text.
    """
    return load_rows(
        files,
        source,
        tokenizer,
        lambda bad: read_relevance(files, source, field=field, bad=bad),
        partial(_write, tokenizer=tokenizer, length=length),
        cache=cache_dir / "examples",
        field=field,
        version=RELEVANCE_VERSION,
        kind="relevance",
        length=length,
    )


def _write(target: Path, rows: Iterator[Judged], bad: BadRows, *, tokenizer: Any, length: int) -> None:
    writer = token_writer(target, tokenizer)
    counter = TokenCounter(tokenizer)
    numbers: dict[str, int] = {}
    num_rows = 0

    def each_pair() -> Iterator[tuple[int, str, str, float]]:
        nonlocal num_rows
        for row in rows:
            num_rows += 1
            number = numbers.setdefault(row.query.strip(), len(numbers))
            yield from ((number, row.query, *judged) for judged in zip(row.passages, row.grades, strict=True))

    pairs = each_pair()
    while batch := list(islice(pairs, BATCH_TEXTS)):
        queries, texts, passages, grades = zip(*batch, strict=True)
        write_texts(writer, counter, tokenization.encode(tokenizer, texts, passages, length))
        writer.add_array("queries", np.asarray(queries, np.int64))
        writer.add_array("labels", np.asarray(grades, np.float64))
    writer.finish(labels=[], has_pairs=True, bad_rows=bad.note(num_rows))


def is_graded(store: TokenStore) -> bool:
    """Whether a label is over 1: then they are grades, not probabilities."""
    return bool((store.arrays["labels"] > 1).any())


def split_queries(store: TokenStore, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits pairs at random for training and evaluation; those of one query stay together.

    Raises DataError if none is left to train on.
    """
    queries = np.asarray(store.arrays["queries"])
    known = np.unique(queries)
    _, held_out = by_lot(len(known), holdout, seed, what="query" if len(known) == 1 else "queries")
    is_held = np.isin(queries, known[held_out])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


class RelevanceSamples(ClassificationSamples):
    """Pairs of one split. `labels` and `queries` are those of its samples, in their order."""

    def __init__(self, store: TokenStore, index: np.ndarray, *, graded: bool, with_types: bool, padding: int) -> None:
        super().__init__(Examples(store, GRADED if graded else BINARY), index, with_types=with_types, padding=padding)
        self.labels = np.asarray(store.arrays["labels"][index])
        self.queries = np.asarray(store.arrays["queries"][index])

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """As for classification, with `labels` as float32; and which samples these are."""
        return replace(super().micro_batch(samples), samples=tuple(sample.sample for sample in samples))

    def num_one_sided(self) -> tuple[int, int, int]:
        """Queries, and of these the ones whose passages all have the same label: relevant ones, and others."""
        order = np.lexsort((self.labels, self.queries))
        queries, labels = self.queries[order], self.labels[order]
        begins = np.flatnonzero(np.append(True, np.diff(queries) > 0))
        lowest, highest = labels[begins], labels[np.append(begins[1:], len(labels)) - 1]
        same = lowest == highest
        return len(begins), int((same & (lowest >= RELEVANT)).sum()), int((same & (lowest < RELEVANT)).sum())
