"""The labels of a source, collected row by row, then interpreted together: the classes, and each text's own."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.columns import Row
from shardyard_trainer.data.errors import DataError, SpecError, listed, shorten
from shardyard_trainer.data.label_canon import LOOKALIKE, KnownLabels, Spellings, as_bit, canonical_key
from shardyard_trainer.data.label_layouts import Reading, Value, read_layout
from shardyard_trainer.data.labels import (
    LABELS_FIELD,
    MOST_LABELS,
    MULTI_LABEL,
    REGRESSION,
    LabelSchema,
    Problem,
    class_name,
    find_schema,
    number,
    unknown_label,
    wrong_label,
)

_LONGEST_TEXT = 2**16
_MOST_SPELLINGS = 4 * MOST_LABELS
_MOST_CELLS = 2**29
"""Texts times classes at most: one byte each, in memory while they are collected, on disk afterwards."""

_MOST_SHOWN = 8


class Wanted(NamedTuple):
    """What a spec says about labels: the problem, the classes (empty: those found), and how they are written.

    `like` is the way in which the labels of the training data were read, for evaluation data that fits several;
    `columns` are those of the classes, one each, if the spec names them.
    """

    problem: Problem
    labels: tuple[str, ...] = ()
    separator: str = ""
    like: str = ""
    columns: tuple[str, ...] = ()

    @property
    def takes_several(self) -> bool:
        """Whether a text may have several labels."""
        return self.problem == MULTI_LABEL


class Labels(NamedTuple):
    """The classes; those of each row (int64, float64, or uint8 [rows · classes]); notes to warn of; how they were read.

    Notes are (reason, message).
    """

    schema: LabelSchema
    array: np.ndarray
    notes: list[tuple[str, str]]
    way: str


class LabelColumn:
    """Collects labels in little memory: each distinct one once, and its number for every row."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._known = KnownLabels(wanted.labels) if wanted.labels else None
        self._given = frozenset(wanted.labels)
        # Also complains about labels given for a regression, which has none.
        self._schema = find_schema(wanted.problem, wanted.labels, set()) if wanted.labels else None
        self._numbers = array("d")
        self._which = array("q")
        self._distinct: dict[Any, int] = {}
        self._values: list[Value] = []
        self._columns: tuple[str, ...] | None = None

    def add(self, row: Row) -> None:
        """Adds the label of the next row. Raises DataError with its line if it is not a label."""
        if self._wanted.problem == REGRESSION:
            self._numbers.append(number(row))
            return
        key = self._several(row) if self._wanted.takes_several else self._one(row)
        place = self._distinct.get(key)
        if place is None:
            # Checked before it is recorded: a refused label leaves no trace, because its row may be skipped.
            self._check(row)
            place = self._distinct[key] = len(self._values)
            label = row.label
            written = key if row.label_names else tuple(label) if isinstance(label, list) else label
            self._values.append(Value(written, row.file, row.line))
        self._which.append(place)

    def finish(self) -> Labels:
        """Interprets everything collected. Raises DataError, SpecError."""
        if self._wanted.problem == REGRESSION:
            return Labels(LabelSchema(REGRESSION, ()), np.asarray(self._numbers), [], "number")
        which = np.asarray(self._which)
        times = np.bincount(which, minlength=len(self._values))
        if self._columns is not None:
            return self._of_columns(which)
        if not self._wanted.takes_several:
            return self._of_one(list(self._distinct), which, times)
        known, separator = self._known, self._wanted.separator
        reading = read_layout(self._values, known, separator=separator, like=self._wanted.like)
        return self._of_places(reading, which) if reading.is_vector else self._of_names(reading, which, times)

    def _one(self, row: Row) -> str:
        return row.label if isinstance(row.label, str) else class_name(row, self._given)

    def _several(self, row: Row) -> Any:
        label = row.label
        if self._columns not in (None, row.label_names) or (row.label_names and self._columns is None and self._values):
            raise DataError("some files have other label columns; give them the same", file=row.file, line=row.line)
        if row.label_names:
            self._columns = row.label_names
            return bytes(_bit(row, name, cell) for name, cell in zip(row.label_names, label, strict=True))
        items = label if isinstance(label, list) else [label]
        if any(not isinstance(item, str | int | float | None) for item in items):
            raise wrong_label(row, "the labels of a text are words or numbers, or one list of them")
        if not isinstance(label, list):
            return (type(label).__name__, label)
        return tuple((type(item).__name__, item) for item in label)

    def _check(self, row: Row) -> None:
        """Checks a label not seen before. Raises DataError."""
        if not self._wanted.takes_several:
            self._known_class(row)
            if len(self._values) > _MOST_SPELLINGS:
                message = (
                    f"more than {_MOST_SPELLINGS:,} different labels; if it is a quantity, set problem to regression"
                )
                raise DataError(message, file=row.file, line=row.line)
        elif isinstance(row.label, list):
            for item in row.label:
                class_name(replace(row, label=item), self._given)
        elif isinstance(row.label, str):
            if len(row.label) > _LONGEST_TEXT:
                raise wrong_label(row, f"it has {len(row.label):,} characters; map the column that holds classes")
        elif row.label is not None and not row.label_names:
            class_name(row, self._given)

    def _known_class(self, row: Row) -> str:
        name = class_name(row, self._given)
        if self._known is not None and self._known.find(name) is None:
            assert self._schema is not None
            raise unknown_label(self._schema, name, row.file, row.line)
        return name

    def _of_one(self, spellings: list[str], which: np.ndarray, times: np.ndarray) -> Labels:
        spelled = Spellings(self._known)
        for spelling, count in zip(spellings, times, strict=True):
            spelled.add(spelling, int(count))
        labels = spelled.labels()
        schema = self._schema or find_schema(self._wanted.problem, (), set(labels.values()))
        index = {label: i for i, label in enumerate(schema.labels)}
        classes = np.asarray([index[labels[spelling]] for spelling in spellings], np.int64)
        return Labels(schema, classes[which], _notes(spelled), "whole")

    def _of_names(self, reading: Reading, which: np.ndarray, times: np.ndarray) -> Labels:
        spelled = Spellings(self._known)
        named: list[list[str]] = []
        for value, cells, count in zip(self._values, reading.cells, times, strict=True):
            names = []
            for cell in cells:
                name = self._known_class(Row(value.file, value.line, "", None, cell))
                spelled.add(cell if isinstance(cell, str) else name, int(count))
                names.append(cell if isinstance(cell, str) else name)
            named.append(names)
        labels = spelled.labels()
        schema = self._schema or find_schema(MULTI_LABEL, (), set(labels.values()))
        index = {label: i for i, label in enumerate(schema.labels)}
        _refuse_wide(len(which), len(index))
        table = np.zeros((len(named), len(index)), np.uint8)
        for place, names in enumerate(named):
            table[place, [index[labels[name]] for name in names]] = 1
        notes = [*_notes(spelled), *_rarely_two(table, schema)]
        return Labels(schema, table[which].reshape(-1), notes, reading.way)

    def _of_places(self, reading: Reading, which: np.ndarray) -> Labels:
        size = max(len(cells) for cells in reading.cells)
        given = self._wanted.labels
        first = next(value for value, cells in zip(self._values, reading.cells, strict=True) if cells)
        if given and len(given) != size:
            raise first.wrong(f"a 0 or 1 for each of {size} classes, but labels has {len(given)}; list them all there")
        names = given or tuple(map(str, range(size)))
        schema = LabelSchema(MULTI_LABEL, names)
        _refuse_wide(len(which), size)
        table = np.zeros((len(reading.cells), size), np.uint8)
        for place, cells in enumerate(reading.cells):
            table[place, : len(cells)] = [bool(as_bit(cell)) for cell in cells]
        notes = _rarely_two(table, schema)
        if names == tuple(map(str, range(size))):
            message = f"the labels are a 0 or 1 for each of {size} classes, called by their places; name them in labels"
            notes.append(("UNNAMED_LABELS", message))
        return Labels(schema, table[which].reshape(-1), notes, reading.way)

    def _of_columns(self, which: np.ndarray) -> Labels:
        columns = self._columns
        assert columns is not None
        names = [class_name(Row("", 0, "", None, name), columns) for name in columns]
        order = list(range(len(names)))
        if self._known is not None:
            matches = [self._known.find(name) for name in names]
            if None in matches or len(set(matches)) != len(self._known.labels):
                if self._wanted.like:
                    raise DataError(
                        f"the label columns are {listed(names, most=_MOST_SHOWN)}, but those of the training data "
                        f"{listed(self._known.labels, most=_MOST_SHOWN)}; set the same ones in label_columns"
                    )
                raise SpecError(
                    LABELS_FIELD,
                    "SPEC_INVALID",
                    f"{listed(self._known.labels, most=_MOST_SHOWN)}, but the label columns are "
                    f"{listed(names, most=_MOST_SHOWN)}; name the same ones, or leave labels out",
                )
            order = [matches.index(label) for label in self._known.labels]
        elif len({canonical_key(name) for name in names}) < len(names):
            raise DataError(f"label columns look alike: {listed(names, most=_MOST_SHOWN)}; rename one, or list labels")
        schema = self._schema or LabelSchema(MULTI_LABEL, tuple(names))
        _refuse_wide(len(which), len(columns))
        table = np.frombuffer(b"".join(self._distinct), np.uint8).reshape(-1, len(columns))[:, order]
        notes = _rarely_two(table, schema)
        if not self._wanted.columns:
            shown = listed(names, most=_MOST_SHOWN)
            message = f"taken for label columns, as they hold 0 and 1 only: {shown}; set label_columns if not meant"
            notes.append(("LABEL_COLUMNS_FOUND", message))
        return Labels(schema, table[which].reshape(-1), notes, "columns")


def _bit(row: Row, name: str, cell: Any) -> bool:
    bit = as_bit(cell)
    if bit is None:
        what = "is missing" if cell is None or cell == "" else f"is {shorten(str(cell))!r}"
        raise DataError(
            f"the label column {shorten(name)!r} {what}; write 0 or 1, leave the row out, or name other columns in "
            "label_columns",
            file=row.file,
            line=row.line,
            column=name,
            value=str(cell),
        )
    return bit


def _notes(spelled: Spellings) -> list[tuple[str, str]]:
    note = spelled.note()
    return [(LOOKALIKE, note)] if note else []


def _refuse_wide(num_rows: int, num_classes: int) -> None:
    if num_rows * num_classes > _MOST_CELLS:
        raise DataError(
            f"{num_rows:,} texts with a 0 or 1 for each of {num_classes:,} classes are {num_rows * num_classes:,} "
            f"numbers; at most {_MOST_CELLS:,}; give fewer texts, or join rare classes into one"
        )


def _rarely_two(table: np.ndarray, schema: LabelSchema) -> list[tuple[str, str]]:
    """Checks the distinct rows of a table of classes. Raises DataError."""
    if len(schema.labels) < 2 or table.sum(1, dtype=np.int64).max(initial=0) > 1:
        return []
    message = (
        f"no text has two labels (of: {listed(schema.labels, most=_MOST_SHOWN)}); if each has one, single_label is "
        "better; if not, give label_separator"
    )
    return [("NO_TEXT_HAS_TWO_LABELS", message)]


def wanted_labels(task: spec_pb2.TextClassification, labels: tuple[str, ...], *, like: str = "") -> Wanted:
    """A spec's settings for labels; `labels` replaces its own for evaluation data."""
    problem = task.problem or spec_pb2.TextClassification.PROBLEM_SINGLE_LABEL
    return Wanted(problem, labels, task.label_separator, like, tuple(task.label_columns))
