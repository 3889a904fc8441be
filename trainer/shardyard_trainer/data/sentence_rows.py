"""Texts that belong together, with a text that does not, or with a score of how alike they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, listed, shorten
from shardyard_trainer.data.labels import number_advice, number_of
from shardyard_trainer.data.passage_cells import MOST_NEGATIVES, NUMBERED_NEGATIVES, OTHER_NEGATIVES, text_in
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.data.records import Record, Role, RowFault, read_as
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.written_lists import texts_in

PAIRS = (
    Role("anchor", ("query", "question")),
    Role("positive", ("positives", "pos", "positive_passages", "answer", "passage", "document", "paraphrase")),
    Role("negative", ("negatives", "neg", "negative_passages", "hard_negative", "hard_negatives"), is_optional=True),
)
_ADVICE = (
    "every positive is learnt as one that belongs to its anchor; to learn how alike the texts are, map them in columns "
    "as text, text_pair and score; else keep the rows that belong together, without that column"
)
_NEGATIVES = (PAIRS[2], *(replace(role, is_optional=True) for role in NUMBERED_NEGATIVES))
_TUPLES = (
    *PAIRS[:2],
    *_NEGATIVES,
    *OTHER_NEGATIVES,
    Role("labels", ("relevances",), is_optional=True, refusal=_ADVICE),
    # Beside negatives it is a number of the row: what belongs together is said.
    Role(
        "label",
        ("score", "relevance", "similarity", "similarity_score", "relatedness_score", "is_duplicate", "scores"),
        is_optional=True,
        refusal=_ADVICE,
        unless=tuple(role.name for role in _NEGATIVES),
    ),
)
_SAME_MEANING = frozenset({"duplicate", "equivalent", "entailment", "paraphrase", "related", "same", "similar", "yes"})

SCORED = (
    Role("text", ("sentence1", "sentence_1", "sentence_a", "text1", "text_1", "text_a", "question1")),
    Role("text_pair", ("sentence2", "sentence_2", "sentence_b", "text2", "text_2", "text_b", "question2")),
    Role("score", ("label", "similarity", "similarity_score", "relatedness_score", "is_duplicate")),
)


@dataclass(frozen=True)
class SentenceRow:
    """Samples of anchor, positive and negatives, none blank; or with a `score` two texts, and how alike they are.

    `kind` says which columns it has, as a message names them.
    """

    file: str
    line: int
    samples: tuple[tuple[str, ...], ...]
    score: float | None
    kind: str


@dataclass(frozen=True)
class ScoreRange:
    """The scores that become a cosine of 0 and of 1; None: they are cosines.

    `is_open`: if they are not cosines, the lowest and the highest score of the data are the range.
    """

    lowest: float | None = None
    highest: float | None = None
    is_open: bool = False

    def check(self, score: float) -> None:
        """Raises ValueError for a score out of range."""
        if self.is_open:
            return
        if self.lowest is None or self.highest is None:
            if not -1 <= score <= 1:
                what = "set lowest_score and highest_score to the range of the scores, such as 0 and 5"
                raise ValueError(f"the score {score:g} is not a cosine, -1 to 1: {what}")
        elif not self.lowest <= score <= self.highest:
            rule = f"{self.lowest:g} to {self.highest:g}, which lowest_score and highest_score say"
            raise ValueError(f"the score {score:g} is not within {rule}: correct it, or widen the range")

    def cosines(self, scores: np.ndarray) -> np.ndarray:
        """The cosines that all scores of the data mean, float32."""
        lowest, highest = self.lowest, self.highest
        if self.is_open and len(scores) and (scores.min() < -1 or scores.max() > 1):
            lowest, highest = float(scores.min()), float(scores.max())
        if lowest is None or highest is None or lowest == highest:
            return np.asarray(scores, np.float32)
        return np.asarray((scores - lowest) / (highest - lowest), np.float32)


def read_sentences(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    scores: ScoreRange,
    *,
    field: str,
    bad: BadRows | None = None,
) -> Iterator[SentenceRow]:
    """Yields the rows of all files in order, all of one kind. Raises DataError for `field`.

    Rows that cannot be used, such as those with a blank text, go to `bad`, if the caller has one and finishes it.
    """
    first: SentenceRow | None = None
    make = partial(_row, scores=scores)
    for row in read_as(make, files, source, (_TUPLES, SCORED), field=field, bad=bad, only_one=True):
        first = first or row
        if row.kind != first.kind:
            message = f"{row.kind}, but {first.file} has {first.kind}; give files with the same columns"
            raise DataError(message, file=row.file, field=field)
        yield row


def _row(record: Record, scores: ScoreRange) -> SentenceRow:
    cells = record.cells
    if "score" in cells:
        texts = tuple(_text(cells[name], name) for name in ("text", "text_pair"))
        value = _score(cells["score"], record.names.get("score", ()))
        scores.check(value)
        return SentenceRow(record.file, record.line, (texts,), value, "scored pairs")
    anchor = _text(cells["anchor"], "anchor")
    positives = _texts(cells["positive"], "positive")
    if not positives:
        raise RowFault("positive", "the positive is an empty list; give a text, or remove the row")
    names = [role.name for role in _NEGATIVES if role.name in cells]
    negatives = [text for name in names for text in _negatives(cells[name], name, positives)]
    if len(negatives) > MOST_NEGATIVES:
        raise ValueError(
            f"the row has {len(negatives):,} negatives; at most {MOST_NEGATIVES} are allowed; leave some out"
        )
    kind = {0: "pairs", 1: "triplets"}.get(len(names), f"{2 + len(names)} texts a row")
    samples = tuple((anchor, positive, *negatives) for positive in positives)
    return SentenceRow(record.file, record.line, samples, None, kind)


def _score(cell: Any, classes: Sequence[str]) -> float:
    """A score: a number, or that of a class which the file names. Raises RowFault."""
    value = number_of(cell)
    if math.isnan(value):
        raise RowFault("score", f"the score is {_shown(cell)}, not a number; {number_advice(cell)}")
    if not classes:
        return value
    if value not in range(len(classes)):
        raise RowFault("score", f"the score is {value:g}, which is none of the file's classes; remove the row")
    numbers = [number_of(name) for name in classes]
    if not any(map(math.isnan, numbers)):
        return numbers[int(value)]
    known = [name.casefold() in _SAME_MEANING for name in classes]
    if known == [False, True]:
        return value
    message = (
        f"the scores are the classes {listed(classes, most=8)}, of which no number says how alike two texts are; give "
        "a column of numbers, such as 1 for the same meaning and 0 for another"
    )
    raise RowFault("score", message)


def _negatives(cell: Any, role: str, positives: Sequence[str]) -> list[str]:
    if cell is None:
        return []
    found = _texts(cell, role)
    same = {" ".join(text.split()) for text in positives}
    if again := next((text for text in found if " ".join(text.split()) in same), ""):
        raise RowFault(role, f"the {role} is the positive, {shorten(again)!r}; give another text, or remove the row")
    return found


def _texts(cell: Any, role: str) -> list[str]:
    """The texts of a cell: those of a list, which may be empty, or one. Raises ValueError."""
    given = texts_in(cell)
    return [_text(cell, role)] if given is None else [_text(each, role) for each in given]


def _text(cell: Any, role: str) -> str:
    """A cell as one text; a list of one text is that text. Raises ValueError."""
    if isinstance(cell, list | tuple) and len(cell) == 1:
        cell = cell[0]
    cell = text_in(cell)
    if not isinstance(cell, str):
        if isinstance(cell, list | tuple):
            raise RowFault(role, f"the {role} is a list of {len(cell)} texts; give one, and a row for each")
        raise RowFault(role, f"the {role} is {_shown(cell)}, not a text; fill it in, or remove the row")
    if not cell.strip():
        raise RowFault(role, f"the {role} is empty; fill it in, or remove the row")
    if fault := unreadable(cell):
        raise RowFault(role, f"the {role} has {fault}")
    return cell


def _shown(cell: Any) -> str:
    return "missing" if cell is None or cell == "" else repr(shorten(str(cell)))
