"""Queries with passages and how relevant each is, in the layouts people use: a pair a row, or a query a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import shorten
from shardyard_trainer.data.passage_cells import NUMBERED_NEGATIVES, OTHER_NEGATIVES, RECORD_TEXTS, text_in
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.data.records import Record, Role, RowFault, read_as
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.written_lists import as_value, shown, texts_in

_QUERY = Role("query", ("question", "anchor"))
_PASSAGE = Role("passage", ("document", "doc", "text", "answer"))
_LABEL = Role("label", ("relevance", "score"))
_POSITIVES = Role("positives", ("positive", "pos", "positive_passages"))
_NEGATIVES = Role("negatives", ("negative", "neg", "negative_passages", "hard_negative", "hard_negatives"))
_LABELS = Role("labels", ("relevances", "scores"))
_ANSWERS = ("answer", "answers", "passage", "document")

LAYOUTS = (
    (_QUERY, _POSITIVES, _NEGATIVES),
    (_QUERY, _POSITIVES, *NUMBERED_NEGATIVES, *OTHER_NEGATIVES),
    (_QUERY, _PASSAGE, _LABEL),
    (_QUERY, Role("passages", ("documents", "docs")), _LABELS),
    (_QUERY, Role("passages", ("documents", "docs"))),
    # Names that mean something else in the files above, and these if nothing else is there.
    (_QUERY, Role("positives", _ANSWERS), _NEGATIVES),
    (_QUERY, Role("positives", _ANSWERS), *NUMBERED_NEGATIVES, *OTHER_NEGATIVES),
    (_QUERY, Role("passages", _ANSWERS), _LABELS),
)
ROLES = ("query", "positives", "negatives", "passage", "label", "passages", "labels")
"""The roles that may be mapped; the numbered negatives are found by their names alone."""
MOST_PASSAGES = 10_000
_LARGEST_GRADE = 1e6
_TRUTHS = {"true": 1.0, "false": 0.0}

# Of the records whose texts `passage_cells` finds.
_RECORD_LABELS = ("is_selected", "label", "relevance", "score")


class Judged(NamedTuple):
    """A row: a query, its passages (one at least), and how relevant each is: 0 is not at all."""

    file: str
    line: int
    query: str
    passages: tuple[str, ...]
    grades: tuple[float, ...]


def read_relevance(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, field: str, bad: BadRows | None = None
) -> Iterator[Judged]:
    """Yields the rows of all files in order. Raises DataError.

    Those that cannot be used go to `bad`, if the caller has one and finishes it.
    """
    yield from read_as(_judged, files, source, LAYOUTS, field=field, bad=bad)


def _judged(record: Record) -> Judged:
    """The passages of a row. Raises RowFault."""
    cells = record.cells
    query = _text(cells["query"], "query")
    if "positives" in cells:
        passages, grades = _grouped(cells)
    elif "passage" in cells:
        passages, grades = [_text(cells["passage"], "passage")], [_grade(cells["label"], "label")]
    else:
        passages, grades = _listed(cells)
    if len(passages) > MOST_PASSAGES:
        raise RowFault("query", f"the query has {len(passages):,} passages; at most {MOST_PASSAGES:,}; leave some out")
    return Judged(record.file, record.line, query, tuple(passages), tuple(grades))


def _grouped(cells: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    positives = _texts(cells["positives"], "positives")
    negatives = [text for name in cells if name.startswith("negative") for text in _texts(cells[name], name)]
    if not positives and not negatives:
        raise RowFault("positives", "the query has no passages; give it some, or leave the row out")
    if both := {text.strip() for text in positives} & {text.strip() for text in negatives}:
        message = f"the passage {shorten(min(both))!r} is a positive of the query and a negative; leave one out"
        raise RowFault("negatives", message)
    return [*positives, *negatives], [1.0] * len(positives) + [0.0] * len(negatives)


def _listed(cells: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    given, labels = as_value(cells["passages"]), as_value(cells.get("labels"))
    if isinstance(given, Mapping):
        texts = next((given[name] for name in RECORD_TEXTS if name in given), None)
        labels = next((given[name] for name in _RECORD_LABELS if name in given), labels)
    elif isinstance(given, list) and given and isinstance(given[0], Mapping):
        texts = [next((each.get(name) for name in RECORD_TEXTS if name in each), None) for each in given]
        own = [next((each[name] for name in _RECORD_LABELS if name in each), None) for each in given]
        labels = labels if None in own else own
    elif isinstance(given, list) and labels is None and all(_is_labelled(each) for each in given):
        texts, labels = [each[0] for each in given], [each[1] for each in given]
    else:
        texts = given
    passages = _texts(texts, "passages")
    if labels is None:
        raise RowFault("passages", "the passages have no labels; map a column with a list of them, as labels: NAME")
    if not isinstance(labels, list | tuple) or len(labels) != len(passages) or not passages:
        number = len(labels) if isinstance(labels, list | tuple) else shown(labels)
        raise RowFault("labels", f"the query has {len(passages)} passages and {number} labels; give each passage one")
    return passages, [_grade(label, "labels") for label in labels]


def _is_labelled(value: Any) -> bool:
    """Whether a value is a passage with its label."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _texts(cell: Any, name: str) -> list[str]:
    """The texts of a cell: a list of them, as itself or as text, one alone, or none."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    given = texts_in(cell)
    return [_text(cell, name)] if given is None else [_text(each, name) for each in given]


def _text(cell: Any, name: str) -> str:
    cell = text_in(cell[0] if isinstance(cell, list | tuple) and len(cell) == 1 else cell)
    if not isinstance(cell, str) or not cell.strip():
        what = "blank" if isinstance(cell, str) else shown(cell)
        raise RowFault(name, f"{name!r} is {what}; write a text, or leave the row out")
    if fault := unreadable(cell):
        raise RowFault(name, f"{name!r} has {fault}")
    return cell


def _grade(cell: Any, name: str) -> float:
    if isinstance(cell, str):
        cell = _TRUTHS.get(cell.strip().casefold(), cell)
    try:
        value = math.nan if isinstance(cell, str) and "_" in cell else float(cell)
    except (ValueError, TypeError, OverflowError):
        value = math.nan
    if not 0 <= value <= _LARGEST_GRADE:
        message = f"{name!r} is {shown(cell)}; write 0 for a passage that is not relevant, and 1 or a grade for others"
        raise RowFault(name, message)
    return value
