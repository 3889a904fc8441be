"""Sources whose rows are tokenised once, into the cache: checked as a whole first, then written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.budget import tokenised
from shardyard_trainer.data.columns import layout_key
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.store import TokenStore, TokenWriter, files_fingerprint, fingerprint_of
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.vocabularies import num_ids

Row = TypeVar("Row")


def load_rows(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: Any,
    read: Callable[[BadRows], Iterator[Row]],
    write: Callable[[Path, Iterator[Row], BadRows], None],
    *,
    cache: Path,
    field: str,
    **settings: Any,
) -> TokenStore:
    """The store of a source, written once into a folder of `cache` that is named after all that decides its content.

    `read` yields the rows and gives unusable ones to its argument. `write` may add further ones to its own, which it
    then finishes. `settings` are the version of the format that `write` has, and whatever else changes what it writes
    besides files, layout and tokenizer. Raises DataError.
    """
    key = {
        **settings,
        "files": files_fingerprint(files, field=field),
        "tokenizer": tokenization.fingerprint(tokenizer),
        "layout": layout_key(source),
    }

    def build(target: Path) -> None:
        # Reading twice costs little beside tokenising, and reports an error in the last row before the long part.
        checked = BadRows(source)
        num_rows = sum(1 for _ in read(checked))
        checked.finish(num_rows, field)
        bad = BadRows(source)
        write(target, read(bad), bad)

    return TokenStore.open(tokenised(cache / fingerprint_of(key), build))


def token_writer(target: Path, tokenizer: Any) -> TokenWriter:
    """A writer of a tokenizer's ids. Two bytes an id, if they suffice, halve the disk and the page cache."""
    return TokenWriter(target, "<u2" if num_ids(tokenizer) <= 2**16 else "<u4")
