"""Labelled texts, tokenised once: their tokens, types and labels on disk, checked row by row on the way there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from shardyard.v1 import spec_pb2
from shardyard_trainer import tokenization
from shardyard_trainer.data.columns import Row, layout_key, read_rows
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.labels import (
    MULTI_LABEL,
    REGRESSION,
    LabelSchema,
    Problem,
    find_schema,
    parse_label,
    unknown_label,
)
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.store import (
    TokenStore,
    TokenWriter,
    build_once,
    files_fingerprint,
    fingerprint_of,
    is_whole,
)
from shardyard_trainer.vocabularies import num_ids

EXAMPLES_VERSION = 3
_BATCH_TEXTS = 512


class Examples(NamedTuple):
    """Labelled texts, and what their labels mean.

    Arrays of the store: `types` (uint8, a type id for each token), and `labels`: the class of each text (int64), its
    number (float64), or for several labels 0 or 1 for each class (uint8 [texts · classes]).
    """

    store: TokenStore
    schema: LabelSchema

    @property
    def has_pairs(self) -> bool:
        """Whether an example is two texts."""
        return bool(self.store.meta["has_pairs"])


def load_examples(
    files: list[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    problem: Problem,
    labels: Iterable[str],
    cache_dir: Path,
    field: str = "spec.train_data",
) -> Examples:
    """Reads, checks and tokenises a source once. `labels` empty: those that are found. Raises DataError, SpecError."""
    given = tuple(labels)
    key = {
        "version": EXAMPLES_VERSION,
        "files": files_fingerprint(files),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "max_length": max_length,
        "problem": int(problem),
        "layout": layout_key(source),
    }
    # A plan found these labels, and has tokenised the same for it, if it was not given them.
    found = cache_dir / "examples" / fingerprint_of({**key, "labels": ()})
    if given and is_whole(found):
        store = TokenStore.open(found)
        if tuple(store.meta["labels"]) == given:
            return Examples(store, LabelSchema(problem, given))

    def build(target: Path) -> None:
        rows = read_rows(files, source, with_label=True, field=field)
        try:
            _tokenise(rows, tokenizer, target, max_length=max_length, problem=problem, given=given)
        except DataError as error:
            # What is found while rows are put together is said of the source that they came from.
            raise (error if error.field.startswith(field) else error.at(field)) from None

    folder = cache_dir / "examples" / fingerprint_of({**key, "labels": given})
    store = TokenStore.open(build_once(folder, build))
    return Examples(store, LabelSchema(problem, tuple(store.meta["labels"])))


def _tokenise(
    rows: Iterator[Row],
    tokenizer: PreTrainedTokenizerFast,
    target: Path,
    *,
    max_length: int,
    problem: Problem,
    given: tuple[str, ...],
) -> None:
    writer = TokenWriter(target, "<u2" if num_ids(tokenizer) <= 2**16 else "<u4")
    known = find_schema(problem, given, set()) if given or problem == REGRESSION else None
    index = {label: i for i, label in enumerate(known.labels)} if known else {}
    parsed: list[Any] = []
    has_pairs: bool | None = None
    while batch := list(islice(rows, _BATCH_TEXTS)):
        for row in batch:
            label = parse_label(row, problem, given)
            for name in _names(label):
                if known is not None and name not in index:
                    raise unknown_label(known, name, row.file, row.line)
            parsed.append(label)
            if has_pairs is not None and has_pairs != (row.text_pair is not None):
                raise DataError("some files have a second text and others none", file=row.file, line=row.line)
            has_pairs = row.text_pair is not None
        pairs = [row.text_pair or "" for row in batch] if has_pairs else None
        ids, types = tokenization.encode_batch(tokenizer, [row.text for row in batch], pairs, max_length)
        writer.add(ids)
        writer.add_array("types", np.fromiter((t for row_types in types for t in row_types), np.uint8))
    schema = known or find_schema(problem, (), {name for label in parsed for name in _names(label)})
    writer.add_array("labels", _label_array(parsed, schema))
    writer.finish(labels=schema.labels, has_pairs=bool(has_pairs))


def _names(label: str | tuple[str, ...] | float) -> tuple[str, ...]:
    if isinstance(label, tuple):
        return label
    return (label,) if isinstance(label, str) else ()


def _label_array(parsed: list[Any], schema: LabelSchema) -> np.ndarray:
    if schema.problem == REGRESSION:
        return np.asarray(parsed, np.float64)
    index = {label: i for i, label in enumerate(schema.labels)}
    if schema.problem != MULTI_LABEL:
        return np.asarray([index[label] for label in parsed], np.int64)
    table = np.zeros((len(parsed), len(index)), np.uint8)
    for row, labels in enumerate(parsed):
        table[row, [index[label] for label in labels]] = 1
    return table.reshape(-1)
