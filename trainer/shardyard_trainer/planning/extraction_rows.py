"""The rows of a feature extraction, by modality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.columns import Row, read_rows
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import files_fingerprint
from shardyard_trainer.inputs.image import EncodedPicture, ImageInputs
from shardyard_trainer.inputs.pictures import Pictures, load_pictures
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.inputs.tokenization import encode
from shardyard_trainer.tasks.vectors import Wish

FIELD = "spec.feature_extraction.data"
_BATCH_TEXTS = 512
_BATCH_PICTURES = 64
"""Decoded pictures in memory at once."""


class Rows(Protocol):
    """The rows of a source, in order."""

    at_once: int
    """Rows for one call of `read`; 0: those of a whole result file."""

    files: list[DataFile]
    """The source of the rows."""

    @property
    def num_rows(self) -> int:
        """The number of rows. Raises DataError."""

    def digest(self) -> str:
        """A fingerprint of everything that the vectors depend on."""

    def read(self, first: int, last: int, wish: Wish) -> list[Any]:
        """Encodes rows for the model. Raises SpecError."""

    def num_tokens(self, encoded: Sequence[Any]) -> int:
        """The size of encoded rows: tokens, or pictures."""

    def names(self, first: int, last: int) -> list[str] | None:
        """The names of rows in their source; None if they only have numbers."""

    def stats(self, wish: Wish) -> DataStats:
        """Statistics of the rows, read as the ranks will read them. Raises DataError, SpecError."""


class TextRows:
    """Texts and pairs of texts."""

    at_once = 0

    def __init__(self, files: list[DataFile], source: spec_pb2.DataSource, inputs: TextInputs) -> None:
        self.files = files
        self._source = source
        self._inputs = inputs

    @cached_property
    def _rows(self) -> list[Row]:
        return list(self._texts())

    def _texts(self) -> Iterator[Row]:
        return read_rows(self.files, self._source, with_label=False, field=FIELD)

    @property
    def num_rows(self) -> int:
        """The number of rows. Raises DataError."""
        return len(self._rows)

    def digest(self) -> str:
        """A fingerprint of all texts."""
        total = hashlib.sha256()
        for row in self._rows:
            total.update(f"{row.text}\0{row.text_pair or ''}\0".encode())
        return total.hexdigest()

    def read(self, first: int, last: int, wish: Wish) -> list[EncodedText]:
        """Encodes texts. Raises SpecError."""
        return self._inputs.encode([(row.text, row.text_pair) for row in self._rows[first:last]], wish.length)

    def num_tokens(self, encoded: Sequence[EncodedText]) -> int:
        """The number of tokens, special ones included."""
        return sum(len(each.ids) for each in encoded)

    def names(self, _first: int, _last: int) -> None:
        """None: texts have no names."""
        return

    def stats(self, wish: Wish) -> DataStats:
        """Texts, their tokens, what is cut of them, and what the tokenizer does not know."""
        for _ in self._texts():
            pass  # Errors of the last row are reported before any is tokenised, which takes ten times as long.
        tokenizer = self._inputs.tokenizer
        counter = TokenCounter(tokenizer)
        total = DataStats(num_samples=0, num_tokens=0, num_cut=0, num_words=0, num_unknown=0)
        for paired, rows in groupby(self._texts(), key=lambda row: row.text_pair is not None):
            while batch := list(islice(rows, _BATCH_TEXTS)):
                pairs = [row.text_pair or "" for row in batch] if paired else None
                encoded = encode(tokenizer, [row.text for row in batch], pairs, wish.length)
                words, unknown = counter.count(encoded.ids)
                total = DataStats(
                    num_samples=total.num_samples + len(batch),
                    num_tokens=total.num_tokens + sum(map(len, encoded.ids)),
                    num_cut=total.num_cut + sum(encoded.cut),
                    num_words=total.num_words + int(words.sum()),
                    num_unknown=total.num_unknown + int(unknown.sum()),
                    num_blank=total.num_blank + int((words == 0).sum()),
                )
        return total


class PictureRows:
    """Pictures of a folder, of Parquet, or of IDX files, each known to decode."""

    at_once = _BATCH_PICTURES

    def __init__(
        self, files: list[DataFile], source: spec_pb2.DataSource, inputs: ImageInputs, cache_dir: Path
    ) -> None:
        self.files = files
        self._source = source
        self._inputs = inputs
        self._cache_dir = cache_dir

    @cached_property
    def _pictures(self) -> Pictures:
        return load_pictures(self.files, self._source, cache_dir=self._cache_dir, field=FIELD)

    @property
    def num_rows(self) -> int:
        """The number of rows. Raises DataError."""
        return self._pictures.store.num_sequences

    def digest(self) -> str:
        """A fingerprint of the files and their names."""
        return files_fingerprint(self.files, field=FIELD)

    def read(self, first: int, last: int, _wish: Wish) -> list[EncodedPicture]:
        """Decodes and prepares pictures."""
        return [EncodedPicture(self._inputs.encode(self._pictures.content(row))) for row in range(first, last)]

    def num_tokens(self, encoded: Sequence[EncodedPicture]) -> int:
        """Pictures."""
        return len(encoded)

    def names(self, first: int, last: int) -> list[str]:
        """The path of each picture in its source."""
        return [self._pictures.name(row) for row in range(first, last)]

    def stats(self, _wish: Wish) -> DataStats:
        """The number of pictures."""
        return DataStats(self.num_rows, self.num_rows, num_cut=0, num_words=0, num_unknown=0)
