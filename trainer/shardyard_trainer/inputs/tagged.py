"""Tagged words, tokenised once: the windows of every text on disk, with the label of each word at its first token."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.budget import in_use, tokenised
from shardyard_trainer.data.columns import layout_key
from shardyard_trainer.data.errors import DataError, listed, nearest, shorten
from shardyard_trainer.data.records import Record, Role, read_records
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore, TokenWriter, files_fingerprint, fingerprint_of
from shardyard_trainer.data.tags import OUTSIDE, SchemeFinder, labels_of, to_bio
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.vocabularies import num_ids
from shardyard_trainer.inputs.words import WordCutter, split_words

IGNORED = -100
TAGGED_VERSION = 1
WORDS = (Role("tokens", ("words",)), Role("tags", ("ner_tags", "pos_tags", "labels")))
SPANS = (Role("text", ("sentence",)), Role("spans", ("entities", "annotations")))
_BATCH_TEXTS = 256


@dataclass(frozen=True)
class TaggedText:
    """Words and their tags as they are written."""

    file: str
    line: int
    words: list[str]
    tags: list[str]


@dataclass(frozen=True)
class TagWish:
    """What a spec says of tags: their scheme (empty: found), and the labels by class id (none: those of the data)."""

    scheme: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaggedTexts:
    """Windows of texts. Arrays of the store: `types`, `words` and `labels` a token; `texts` (int64) a window."""

    store: TokenStore
    labels: tuple[str, ...]
    scheme: str
    num_texts: int


def read_tagged(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, names: Sequence[str], field: str
) -> Iterator[TaggedText]:
    """Words with their tags, from lists of both or from texts with spans. Raises DataError.

    `names` are the tags by their numbers, for data that has numbers.
    """
    for record in read_records(files, source, (WORDS, SPANS), field=field):
        try:
            words, tags = _of_spans(record) if "spans" in record.cells else _of_lists(record, names)
        except ValueError as error:
            raise DataError(str(error), file=record.file, line=record.line, field=field) from None
        if len(words) != len(tags):
            message = f"{len(words)} tokens, but {len(tags)} tags; give each token a tag"
            raise DataError(message, file=record.file, line=record.line, field=field)
        yield TaggedText(record.file, record.line, words, tags)


class TaggedWords:
    """The texts of a source with single spaces between their words, as often as they are asked for."""

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
        finder, num_tags = SchemeFinder(), 0
        # All rows before the first is tokenised: what is wrong with the last one is said early.
        for text in read_tagged(files, source, names=wish.labels, field=field):
            finder.add(text.tags)
            num_tags += len(text.tags)
        if not num_tags:
            raise DataError("no row has a word with a tag", field=field)
        scheme = wish.scheme or finder.scheme
        labels = labels_of({*finder.seen, *wish.labels}, scheme)
        # Given labels that say just these keep their order: it is that of a head's outputs.
        known = wish.labels if set(wish.labels) == set(labels) else labels
        rows = read_tagged(files, source, names=wish.labels, field=field)
        _tokenise(rows, WordCutter(tokenizer, length, overlap), tokenizer, target, labels=known, scheme=scheme)

    return _opened(tokenised(_folder(cache_dir, key), build))


def _planned(cache_dir: Path, key: Mapping[str, Any], wish: TagWish) -> TaggedTexts | None:
    """What a plan has left of the same texts: it found the scheme, and the labels if it was not given any."""
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
    scheme: str,
) -> None:
    writer = TokenWriter(target, "<u2" if num_ids(tokenizer) <= 2**16 else "<u4")
    counter = TokenCounter(tokenizer)
    ids = {label: at for at, label in enumerate(labels)}
    num_texts = 0
    while batch := list(islice(rows, _BATCH_TEXTS)):
        windows, of, tags = [], [], []
        for text in batch:
            found = [ids[tag] for tag in to_bio(text.tags, scheme)]
            for window in cutter.cut(text.words):
                windows.append(window)
                of.append(num_texts)
                tags += [
                    found[word] if first else IGNORED for word, first in zip(window.words, window.firsts, strict=True)
                ]
            num_texts += 1
        tokens = [window.ids for window in windows]
        writer.add(tokens)
        writer.add_array("types", np.fromiter((t for window in windows for t in window.type_ids), np.uint8))
        writer.add_array("labels", np.asarray(tags, np.int32))
        writer.add_array("texts", np.asarray(of, np.int64))
        words, unknown = counter.count(tokens)
        writer.add_array("counted", words)
        writer.add_array("unknown", unknown)
    writer.finish(labels=list(labels), scheme=scheme, num_texts=num_texts)


class TaggedSamples:
    """The windows of some texts, padded on the right to the longest of a micro batch."""

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
        """Tokens of each window, int32."""
        return self._lengths

    def text_of(self, samples: np.ndarray) -> np.ndarray:
        """The texts that windows are of, int64."""
        return np.asarray(self.data.store.arrays["texts"][self._index[samples]])

    def stats(self) -> DataStats:
        """What they hold; nothing is cut."""
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
            labels[i, :length], mask[i, :length] = store.arrays["labels"][part], 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
        if self._with_types:
            inputs["token_type_ids"] = torch.from_numpy(types)
        num_units = int((labels != IGNORED).sum())
        return MicroBatch(inputs, num_units, int(lengths.sum()), ids.size, tuple(chosen))


def _of_lists(record: Record, names: Sequence[str]) -> tuple[list[str], list[str]]:
    words = [str(word) for word in _as_list(record.cells["tokens"], "tokens")]
    tags = _as_list(record.cells["tags"], "tags")
    numbers = [tag for tag in tags if isinstance(tag, int | np.integer) and not isinstance(tag, bool)]
    if not numbers:
        return words, [_known(str(tag), names) for tag in tags]
    if len(numbers) < len(tags):
        raise ValueError("some tags are numbers and others names; write all as one of them")
    if not names:
        raise ValueError("the tags are numbers; say which tags they are in labels, in the order of the numbers")
    worst = max(numbers, key=lambda number: number if number >= 0 else len(names) - number)
    if not 0 <= worst < len(names):
        raise ValueError(f"the tag {worst}, but labels has {len(names)} names, for 0 to {len(names) - 1}")
    return words, [names[int(number)] for number in numbers]


def _known(tag: str, names: Sequence[str]) -> str:
    if names and tag not in names and tag.partition("-")[2] not in {name.partition("-")[2] for name in names}:
        raise ValueError(f"the tag {shorten(tag)!r} is none of labels: {listed(names)}{nearest(tag, names)}")
    return tag


def _of_spans(record: Record) -> tuple[list[str], list[str]]:
    """Words of a text, tagged with the spans of characters that cover them."""
    text = record.cells["text"]
    if not isinstance(text, str):
        raise ValueError(f"the text is {shorten(str(text))!r}; give a string")
    places = split_words(text)
    tags = [OUTSIDE] * len(places)
    for span in _as_list(record.cells["spans"], "spans"):
        start, end, label = _span(span, len(text))
        covered = [at for at, (first, last) in enumerate(places) if first < end and last > start]
        if not covered:
            raise ValueError(f"the span {start} to {end} ({shorten(label)}) covers no word")
        if any(tags[at] != OUTSIDE for at in covered):
            raise ValueError(f"the span {start} to {end} ({shorten(label)}) overlaps with another; leave one out")
        for at in covered:
            tags[at] = f"{'B' if at == covered[0] else 'I'}-{label}"
    return [text[first:last] for first, last in places], tags


def _span(span: Any, size: int) -> tuple[int, int, str]:
    if isinstance(span, dict):
        start, end, label = span.get("start"), span.get("end"), span.get("label", span.get("type"))
    elif isinstance(span, list | tuple) and len(span) == 3:
        start, end, label = span
    else:
        raise ValueError(f"the span {shorten(str(span))!r} is not {{start, end, label}}")
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label:
        raise ValueError(f"the span {shorten(str(span))!r}: start and end are whole numbers, label is a name")
    if not 0 <= start < end <= size:
        raise ValueError(f"the span {start} to {end} is not inside of the text's {size} characters")
    return start, end, label


def _as_list(cell: Any, what: str) -> list[Any]:
    """A list, or one that is written as text: JSON, Python's way, or words parted by spaces."""
    if isinstance(cell, str):
        written = cell.strip()
        if not written.startswith(("[", "(")):
            return written.split()
        for read in (json.loads, ast.literal_eval):
            try:
                cell = read(written)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if isinstance(cell, np.ndarray):
        cell = cell.tolist()
    if not isinstance(cell, list | tuple):
        raise ValueError(f"{what} is {shorten(str(cell))!r}; give a list")
    return list(cell)


def split_texts(data: TaggedTexts, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts to train on and to evaluate on, by lot. Raises DataError if none is left to train on."""
    order = np.random.default_rng([seed, 0x401D]).permutation(data.num_texts)
    held = round(data.num_texts * holdout) or int(holdout > 0)
    if data.num_texts - held < 1:
        raise DataError(f"{data.num_texts} row: nothing would be left to train on; give eval_data, or holdout 0")
    return np.sort(order[held:]), np.sort(order[:held])
