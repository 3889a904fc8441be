"""A corpus as a stream of tokens, cut into blocks by a pure function of (seed, pass, sequence length).

In every pass the documents come in another order; a block is a window of the stream. Where one document ends and the
next begins inside a block, the positions restart, and the model is kept from looking across.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.budget import tokenised
from shardyard_trainer.data.columns import layout_key, read_rows
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore, files_fingerprint, fingerprint_of
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.loading import token_writer
from shardyard_trainer.inputs.tokenization import encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises

CORPUS_VERSION = 4
_BATCH_TEXTS = 512
# A whole file read as one document is tokenised in pieces of about this many characters, cut at line breaks.
_PIECE = 2**20
# With at least this many documents, whole ones are held out; with fewer, the end of the stream.
_FEW_DOCUMENTS = 10


class Frame(NamedTuple):
    """Token ids placed before and after each document; empty: none."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def causal_frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """Begin and end tokens for next-token prediction.

    If they are the same token (GPT-2), it appears once between documents: it ends one and begins the next.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        eos = tokenizer.sep_token_id
    if bos is None or bos == eos:
        return Frame((), ()) if eos is None else Frame((eos,), ())
    return Frame((bos,), () if eos is None else (eos,))


def masked_frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """The begin and end tokens that an encoder expects around a text."""
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return Frame(() if cls is None else (cls,), () if sep is None else (sep,))


@dataclass(frozen=True)
class Corpus:
    """Documents of one split: a range of a store's documents, or of its tokens if the documents are few."""

    tokens: np.ndarray
    starts: np.ndarray
    """Where each document begins, relative to `tokens`; the first is 0."""
    continues: np.ndarray | None
    """1 for a token that continues a word; present if whole words are masked."""
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens, frames included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents, one that is cut by the split included."""
        return len(self.starts)


def load_corpus(
    files: list[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: PreTrainedTokenizerFast,
    frame: Frame,
    *,
    whole_words: bool,
    cache_dir: Path,
    field: str = "spec.train_data",
) -> TokenStore:
    """Tokenises a source once and maps the result. Raises DataError."""
    key = fingerprint_of(
        {
            "version": CORPUS_VERSION,
            "files": files_fingerprint(files, field=field),
            "tokenizer": tokenization.fingerprint(tokenizer),
            "frame": frame,
            "whole_words": whole_words,
            "layout": layout_key(source),
        }
    )

    def build(target: Path) -> None:
        texts = Texts(files, source, field=field)
        bad_rows = texts.check()
        _tokenise(texts, tokenizer, frame, whole_words, target, bad_rows=bad_rows)

    return TokenStore.open(tokenised(cache_dir / "corpora" / key, build))


class Texts:
    """The documents of a source, in order; read again on every iteration."""

    def __init__(self, files: list[DataFile], source: spec_pb2.DataSource, *, field: str) -> None:
        self._files = files
        self._source = source
        self._field = field

    def check(self) -> str:
        """Reads all texts before any is tokenised, which takes long: so an error in the last one is reported early.

        Returns the warning about skipped rows. Raises DataError.
        """
        bad = BadRows(self._source)
        rows = read_rows(self._files, self._source, with_label=False, field=self._field, bad=bad)
        num_rows = sum(1 for _ in rows)
        bad.finish(num_rows, self._field)
        return bad.note(num_rows)

    def __iter__(self) -> Iterator[str]:
        return (row.text for row in read_rows(self._files, self._source, with_label=False, field=self._field))


def whole(store: TokenStore) -> Corpus:
    """The corpus of all documents of a store."""
    return _slice(store, 0, len(store.tokens), int(store.meta["num_bytes"]))


def split(store: TokenStore, holdout: float) -> tuple[Corpus, Corpus | None]:
    """Training part and held-out end: whole documents if there are enough, else the last part of the tokens."""
    if holdout <= 0:
        return whole(store), None
    total, num_bytes = len(store.tokens), store.arrays["bytes"]
    if store.num_sequences >= _FEW_DOCUMENTS:
        held = max(1, round(store.num_sequences * holdout))
        first = store.num_sequences - held
        cut = int(store.offsets[first])
        train_bytes = int(num_bytes[:first].sum())
    else:
        cut = int(total * (1 - holdout))
        # The cut is inside a document, whose bytes are known as a whole alone: they are split like its tokens.
        train_bytes = round(int(store.meta["num_bytes"]) * cut / max(1, total))
    eval_bytes = int(store.meta["num_bytes"]) - train_bytes
    return _slice(store, 0, cut, train_bytes), _slice(store, cut, total, eval_bytes)


def corpus_stats(corpus: Corpus, blocks: Blocks, counter: TokenCounter, *, num_tokens: int) -> DataStats:
    """Statistics of packed sequences; nothing is cut, and unknown tokens are counted over the whole corpus."""
    words, unknown = counter.count_all(corpus.tokens)
    return DataStats(blocks.num_blocks, num_tokens, num_cut=0, num_words=words, num_unknown=unknown)


class Blocks:
    """Windows of `length` tokens of a corpus, in another order of documents and from another offset in every pass.

    For training, window i of a pass is `length` inputs and one token more, the last target. The stream is a ring; no
    token is a target twice in a pass, and fewer than `length`, others in every pass, are none: they fill no window.
    For evaluation nothing is shuffled and the last window is short.
    """

    def __init__(self, corpus: Corpus, length: int, *, seed: int, shuffle: bool, overlap: int) -> None:
        self._corpus = corpus
        self.length = length
        self._seed = seed
        self._shuffle = shuffle
        self._overlap = overlap
        usable = corpus.num_tokens - overlap
        # In training the stream is a ring: its last window's last target is its first token.
        self.num_blocks = corpus.num_tokens // length if shuffle else max(0, math.ceil(usable / length))
        # A batch that spans two passes needs the orders of both.
        self._order = lru_cache(maxsize=2)(self._make_order)

    def block(self, data_epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the window in the corpus's tokens, and for each of them whether a document begins there.

        At most `length + overlap` long. The first token of a window counts as a beginning.
        """
        order, lengths_before, offset = self._order(data_epoch)
        total = self._corpus.num_tokens
        first = index * self.length
        size = min(self.length + self._overlap, total - first) if not self._shuffle else self.length + self._overlap
        places = (offset + first + np.arange(size, dtype=np.int64)) % total
        # The window is found by search, not looked up: a table of all blocks would have to be made for every pass.
        which = np.searchsorted(lengths_before, places, side="right") - 1
        within = places - lengths_before[which]
        starts = within == 0
        # A window that begins inside a document does not see what came before, so its positions restart as well.
        starts[0] = True
        return self._corpus.starts[order[which]] + within, starts

    def _make_order(self, data_epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        corpus = self._corpus
        lengths = np.diff(np.append(corpus.starts, corpus.num_tokens))
        order = np.arange(len(lengths))
        offset = 0
        if self._shuffle:
            random = np.random.default_rng([self._seed, data_epoch, 0x5EED])
            order = random.permutation(len(lengths))
            # Another offset in every pass: else a corpus of one document would be cut at the same places each time.
            offset = int(random.integers(self.length))
        before = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[order][:-1], out=before[1:])
        return order, before, offset


def _slice(store: TokenStore, first: int, last: int, num_bytes: int) -> Corpus:
    inside = store.offsets[(store.offsets > first) & (store.offsets < last)] - first
    starts = np.concatenate([np.zeros(1, np.int64), inside]) if last > first else np.zeros(0, np.int64)
    continues = store.arrays.get("continues")
    # A document without tokens begins where the next one does: the two have one start.
    return Corpus(
        store.tokens[first:last], np.unique(starts), None if continues is None else continues[first:last], num_bytes
    )


def _tokenise(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    frame: Frame,
    whole_words: bool,
    target: Path,
    *,
    bad_rows: str,
) -> None:
    writer = token_writer(target, tokenizer)
    num_bytes = 0
    stream = iter(texts)
    while batch := list(islice(stream, _BATCH_TEXTS)):
        pieces = [_pieces(text) for text in batch]
        with encoding_raises(encoding_fault):
            encoded = iter(
                tokenizer.backend_tokenizer.encode_batch(
                    [p for parts in pieces for p in parts], add_special_tokens=False
                )
            )
        documents, continues = [], []
        for parts in pieces:
            ids, words = [*frame.before], [0] * len(frame.before)
            for _ in parts:
                piece = next(encoded)
                ids += piece.ids
                words += _continues(piece.word_ids) if whole_words else []
            documents.append([*ids, *frame.after])
            continues += [*words, *([0] * len(frame.after))]
        sizes = [len(text.encode()) for text in batch]
        num_bytes += sum(sizes)
        writer.add(documents, bytes=sizes)
        if whole_words:
            writer.add_array("continues", np.asarray(continues, np.uint8))
    writer.finish(num_bytes=num_bytes, bad_rows=bad_rows)


def _pieces(text: str) -> list[str]:
    if len(text) <= _PIECE:
        return [text]
    pieces, first = [], 0
    while first < len(text):
        cut = text.find("\n", first + _PIECE)
        last = len(text) if cut < 0 else cut + 1
        pieces.append(text[first:last])
        first = last
    return pieces


def _continues(words: list[int | None]) -> list[int]:
    return [int(i > 0 and word is not None and word == words[i - 1]) for i, word in enumerate(words)]


def check_enough(corpus: Corpus, num_blocks: int, length: int, *, field: str) -> None:
    """Raises DataError if the corpus is shorter than one sequence of `length`."""
    if num_blocks == 0:
        raise DataError(
            f"{corpus.num_tokens:,} tokens in {corpus.num_documents:,} documents are less than one sequence of "
            f"{length:,}; give more text or a smaller sequence_length",
            field=field,
        )


def positions_from(starts: np.ndarray) -> np.ndarray:
    """Positions that restart at every start, from booleans [T] of which the first is true."""
    index = np.arange(len(starts))
    return index - np.maximum.accumulate(np.where(starts, index, 0))
