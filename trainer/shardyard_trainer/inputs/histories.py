"""Histories of users, built once on disk: the items of each user in order of time, and the catalogue of all items.

Rows are filtered by rating, then by how often users and items occur (k-core), then sorted by user and time; what is
equal in both stays in the order of the files.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.budget import tokenised
from shardyard_trainer.data.columns import layout_key
from shardyard_trainer.data.errors import DataError, listed
from shardyard_trainer.data.interactions import Clock, read_interactions
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.store import TokenStore, TokenWriter, files_fingerprint, fingerprint_of

HISTORIES_VERSION = 1
MOST_INTERACTIONS = 2**28


class Source(NamedTuple):
    """Files with interactions, and the field of the spec that names them."""

    files: Sequence[DataFile]
    source: spec_pb2.DataSource
    field: str


class Filters(NamedTuple):
    """Which interactions count. `catalogue` has the items that a model already knows; empty: those of the data."""

    min_user: int = 1
    min_item: int = 1
    min_rating: float | None = None
    catalogue: tuple[str, ...] = ()


@dataclass(frozen=True)
class Histories:
    """The items of each user: item i of the catalogue is the token i + 1, and 0 is an item of no training data.

    Arrays of the store, one value an interaction: `tokens` (uint32), `times` (float64, if the data has any), and
    `held` (uint8, 1 for the evaluation data's).
    """

    store: TokenStore
    items: tuple[str, ...]

    @property
    def has_times(self) -> bool:
        """Whether the interactions have times."""
        return bool(self.store.meta["has_times"])

    @property
    def bad_rows(self) -> Mapping[str, str]:
        """Warnings about skipped rows, by the field of their source."""
        found: dict[str, str] = self.store.meta["bad_rows"]
        return found

    def count(self, name: str) -> int:
        """How many rows there were (`rows`), had a low rating (`low`), were there twice (`doubled`), or were of rare
        users or items (`rare`).
        """
        return int(self.store.meta["counts"][name])

    def users(self) -> np.ndarray:
        """The user of each interaction, int64: their places in the store."""
        return np.repeat(np.arange(self.store.num_sequences), self.store.lengths())


def load_histories(train: Source, held_out: Source | None, filters: Filters, cache_dir: Path) -> Histories:
    """Reads, checks and sorts the interactions once. Raises DataError."""
    sources = [train, *([held_out] if held_out is not None else [])]
    key = {
        "version": HISTORIES_VERSION,
        "files": [files_fingerprint(each.files, field=each.field) for each in sources],
        "layouts": [layout_key(each.source) for each in sources],
        "filters": filters,
    }

    def build(target: Path) -> None:
        rows, clock = _Rows(), Clock()
        for number, source in enumerate(sources):
            rows.read(source, clock, filters.min_rating, is_held=number > 0)
        _write(target, rows, filters, has_times=clock.has_times, field=train.field)

    store = TokenStore.open(tokenised(cache_dir / "histories" / fingerprint_of(key), build))
    return Histories(store, tuple(store.meta["items"]))


@dataclass
class _Rows:
    """Interactions as numbers, in the order of the files."""

    user_ids: dict[str, int] = field(default_factory=dict)
    item_ids: dict[str, int] = field(default_factory=dict)
    users: array[int] = field(default_factory=lambda: array("i"))
    items: array[int] = field(default_factory=lambda: array("i"))
    times: array[float] = field(default_factory=lambda: array("d"))
    held: array[int] = field(default_factory=lambda: array("b"))
    num_low: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    """Warnings about rows that could not be read and were skipped, by the field of their source."""

    def read(self, source: Source, clock: Clock, min_rating: float | None, *, is_held: bool) -> None:
        """Adds those of a source. Raises DataError."""
        rated, bad, num_rows = min_rating is not None, BadRows(source.source), 0
        for row in read_interactions(source.files, source.source, clock, rated=rated, field=source.field, bad=bad):
            num_rows += 1
            if min_rating is not None and row.rating is not None and row.rating < min_rating:
                self.num_low += 1
                continue
            if len(self.users) == MOST_INTERACTIONS:
                message = f"more than {MOST_INTERACTIONS:,} interactions; leave out old ones"
                raise DataError(message, file=row.file, line=row.line, field=source.field)
            self.users.append(self.user_ids.setdefault(row.user, len(self.user_ids)))
            self.items.append(self.item_ids.setdefault(row.item, len(self.item_ids)))
            self.times.append(row.time or 0.0)
            self.held.append(is_held)
        bad.finish(num_rows, source.field)
        if note := bad.note(num_rows):
            self.bad[source.field] = note


@dataclass(frozen=True)
class _Table:
    """Interactions as arrays of one length."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    held: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> _Table:
        """A selection: a boolean mask, or indices in a new order."""
        return _Table(self.users[rows], self.items[rows], self.times[rows], self.held[rows])


def _write(target: Path, rows: _Rows, filters: Filters, *, has_times: bool, field: str) -> None:
    table = _Table(*(np.asarray(each) for each in (rows.users, rows.items, rows.times, rows.held)))
    counts = {"rows": len(table) + rows.num_low, "low": rows.num_low}
    # A stable sort: ties stay in the order of the files.
    table = table.take(np.lexsort((table.times, table.users)))
    num_before = len(table)
    if has_times:
        table = _without_doubles(table)
    counts["doubled"], num_before = num_before - len(table), len(table)
    table = _core(table, filters)
    counts["rare"] = num_before - len(table)
    if not (table.held == 0).any():
        raise DataError(_nothing_left(counts, filters), field=field)
    names = list(rows.item_ids)
    tokens, items = _tokens(table, names, filters.catalogue, field)
    writer = TokenWriter(target, "<u4")
    starts = np.flatnonzero(np.diff(table.users, prepend=-1))
    writer.add_array("tokens", tokens.astype("<u4"))
    writer.add_array("offsets", np.append(starts, len(table)).astype(np.int64))
    writer.add_array("times", table.times)
    writer.add_array("held", table.held.astype(np.uint8))
    writer.finish(items=items, has_times=has_times, counts=counts, bad_rows=rows.bad)


def _without_doubles(table: _Table) -> _Table:
    """Removes duplicates (same user, item and time); the first one stays."""
    order = np.lexsort((table.items, table.times, table.users))
    sorted_ = table.take(order)
    same = np.zeros(len(table), bool)
    same[1:] = (np.diff(sorted_.users) == 0) & (np.diff(sorted_.times) == 0) & (np.diff(sorted_.items) == 0)
    keeps = np.ones(len(table), bool)
    keeps[order[same]] = False
    return table.take(keeps)


def _core(table: _Table, filters: Filters) -> _Table:
    """Removes rare users and items of the training data until none is left (k-core): each removal can cause others."""
    if max(filters.min_user, filters.min_item) <= 1:
        return table
    trained = table.held == 0
    keeps = trained.copy()
    while True:
        of_user = np.bincount(table.users[keeps], minlength=int(table.users.max(initial=0)) + 1)
        of_item = np.bincount(table.items[keeps], minlength=int(table.items.max(initial=0)) + 1)
        left = keeps & (of_user[table.users] >= filters.min_user) & (of_item[table.items] >= filters.min_item)
        if left.sum() == keeps.sum():
            break
        keeps = left
    # The evaluation data loses only users that were removed here: a new user was never rare.
    went = np.setdiff1d(table.users[trained], table.users[keeps])
    return table.take(keeps | (~trained & ~np.isin(table.users, went)))


def _tokens(table: _Table, names: list[str], catalogue: Sequence[str], field: str) -> tuple[np.ndarray, list[str]]:
    """The token of each interaction, and the catalogue: items of the training data as they first occur in the files.

    Raises DataError for items that a given catalogue does not have.
    """
    trained = np.unique(table.items[table.held == 0])
    items = list(catalogue) or [names[item] for item in trained]
    known = {item: token for token, item in enumerate(items, start=1)}
    if strangers := [names[item] for item in trained if names[item] not in known]:
        message = (
            f"{len(strangers):,} items are not in the catalogue of the model ({listed(strangers, most=3)}); leave "
            "their rows out, or train a fresh model"
        )
        raise DataError(message, field=field)
    token_of = np.asarray([known.get(name, 0) for name in names], np.int64)
    # An item that only the evaluation data has is unknown to training.
    if not catalogue:
        token_of[np.setdiff1d(np.arange(len(names)), trained)] = 0
    return token_of[table.items], items


def _nothing_left(counts: Mapping[str, Any], filters: Filters) -> str:
    why = []
    if counts["low"]:
        why.append(f"{counts['low']:,} have a rating under {filters.min_rating:g}")
    if counts["rare"]:
        why.append(
            f"{counts['rare']:,} are of users with fewer than {filters.min_user} or of items with fewer than "
            f"{filters.min_item}"
        )
    return f"none of {counts['rows']:,} interactions is left ({'; '.join(why)}); lower the limits"
