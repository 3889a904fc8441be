"""Questions with contexts and answers in the layouts people use: SQuAD's JSON, or one row for each question."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.records import Record, Role, read_records
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.squad import is_nested, read_nested
from shardyard_trainer.data.written_lists import as_value, shown
from shardyard_trainer.reading import about, reading

_ASKED = (Role("question", ("query",)), Role("context", ("passage", "paragraph")))
_ID = Role("id", ("question_id", "qas_id", "qid"), is_optional=True)
_START = ("answer_starts", "start")
WITH_ANSWERS = (*_ASKED, Role("answers", ("answer",)), Role("answer_start", _START, is_optional=True), _ID)
WITH_TEXTS = (*_ASKED, Role("answer_text", ("answer_texts",)), Role("answer_start", _START), _ID)

_MOST_ANSWERS = 1000
_WRITTEN = re.compile(r"-?[0-9]{1,15}(?:\.0+)?")
"""A number of a character as text; pandas writes whole numbers with a point if some are missing."""


@dataclass(frozen=True)
class AskedQuestion:
    """A question and the character offsets (start, end) of its answers; empty if the context has no answer."""

    file: str
    line: int
    id: str
    question: str
    context: str
    answers: list[tuple[int, int]]


def read_questions(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, field: str, bad: BadRows | None = None
) -> Iterator[AskedQuestion]:
    """Yields the questions of all files in order. Raises DataError.

    Those that cannot be used go to `bad`, if the caller has one and finishes it.
    """
    own, num_good = bad or BadRows(source), 0
    for file in files:
        for record in _records(file, source, own, field):
            try:
                found = _question(record)
            except ValueError as error:
                own.skip(DataError(f"{_named(record)}{error}", file=record.file, line=record.line, field=field))
                continue
            num_good += 1
            yield found
    if bad is None:
        own.finish(num_good, field)


def _records(file: DataFile, source: spec_pb2.DataSource, bad: BadRows, field: str) -> Iterator[Record]:
    about(field, "DATA_INVALID")
    reading(file.name)
    try:
        nested = is_nested(file)
        if nested and (other := next((pair for pair in sorted(source.columns.items()) if pair[0] != pair[1]), None)):
            message = f"the file is SQuAD's JSON, whose parts have names of their own; leave {other[0]} out of columns"
            raise DataError(message, file=file.name, column=other[0], value=other[1], field=f"{field}.columns")
        if nested:
            yield from read_nested(file)
            return
    except DataError as error:
        raise error if error.column else error.at(field) from None
    yield from read_records([file], source, (WITH_ANSWERS, WITH_TEXTS), field=field, bad=bad)


def _named(record: Record) -> str:
    """The start of a message about a question: its id, if the file has ids."""
    own = record.cells.get("id")
    return "" if own is None or own == "" else f"question {shorten(str(own))!r}: "


def _question(record: Record) -> AskedQuestion:
    question, context = (_text(record.cells.get(name), name) for name in ("question", "context"))
    answers = _answers(record.cells)
    if len(answers) > _MOST_ANSWERS:
        raise ValueError(f"{len(answers):,} answers; at most {_MOST_ANSWERS:,}")
    if record.cells.get("is_impossible") is True and answers:
        raise ValueError("is_impossible is true, but there are answers; leave one of them out")
    places = [_place(context, text, start, at) for at, (text, start) in enumerate(answers)]
    own = record.cells.get("id")
    # White space before a question would become part of it; transformers' own examples remove it as well.
    return AskedQuestion(record.file, record.line, "" if own is None else str(own), question.strip(), context, places)


def _text(cell: Any, what: str) -> str:
    if not isinstance(cell, str):
        raise ValueError(f"the {what} is {shown(cell)}; give a text")
    if not cell.strip():
        raise ValueError(f"the {what} is empty; leave the question out, or give its {what}")
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {what} has half of a surrogate pair; write the whole character") from None
    return cell


def _answers(cells: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The texts and starts of the answers as written. Raises ValueError."""
    starts = as_value(cells.get("answer_start"))
    if "answers" not in cells:
        return _pairs(_listed(cells.get("answer_text"), starts), starts)
    value = as_value(cells["answers"])
    if isinstance(value, Mapping):
        if missing := [name for name in ("text", "answer_start") if name not in value]:
            raise ValueError(f"the answers have no `{missing[0]}`; give them as {_FORM}")
        return _pairs(value["text"], value["answer_start"])
    if isinstance(value, list | tuple) and all(isinstance(each, Mapping) for each in value):
        if not all({"text", "answer_start"} <= set(each) for each in value):
            raise ValueError(f"the answers are {shown(value)}; give each as {_FORM}")
        return [(each["text"], each["answer_start"]) for each in value]
    if starts is None:
        raise ValueError(f"the answers are {shown(cells['answers'])}; give them as {_FORM}, with empty lists for none")
    return _pairs(_listed(cells["answers"], starts), starts)


_FORM = '{"text": [...], "answer_start": [...]}'


def _listed(cell: Any, starts: Any) -> Any:
    """Texts of answers: a list if the starts are one, also a list written as text; else one text, brackets and all."""
    return as_value(cell) if isinstance(starts, list | tuple) or cell is None else cell


def _pairs(texts: Any, starts: Any) -> list[tuple[Any, Any]]:
    if texts in (None, "") and starts is None:
        raise ValueError(f"the answers are missing; give them as {_FORM}, with empty lists for none")
    texts, starts = (list(each) if isinstance(each, list | tuple) else [each] for each in (texts, starts))
    if len(texts) != len(starts):
        raise ValueError(f"{len(texts)} texts of answers, but {len(starts)} answer_start; give each answer a start")
    return list(zip(texts, starts, strict=True))


def _place(context: str, text: Any, start: Any, at: int) -> tuple[int, int]:
    """The offsets of an answer. Raises ValueError if the context has another text there, and shows that text."""
    what = f"answer {at + 1}" if at else "the answer"
    if isinstance(start, str) and _WRITTEN.fullmatch(start.strip()):
        start = int(float(start))
    if isinstance(start, float | np.floating) and float(start).is_integer():
        start = int(start)
    if not isinstance(start, int | np.integer) or isinstance(start, bool):
        raise ValueError(f"{what} has the answer_start {shown(start)}; give the number of its first character, from 0")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {shown(text)}; give a text, or empty lists for a question without an answer")
    start = int(start)
    if start >= 0 and context.startswith(text, start):
        return start, start + len(text)
    there = (
        f"the context has {shorten(context[start : start + len(text)])!r} there" if 0 <= start < len(context) else ""
    )
    there = there or f"the context has {len(context):,} characters"
    raise ValueError(f"{what} {shorten(text)!r} is not at answer_start {start}: {there}; {_why(context, text, start)}")


def _why(context: str, text: str, start: int) -> str:
    """The likely reason for a wrong start, and the right one."""
    found = _nearest(context, text, start)
    if found < 0:
        bare = text.strip()
        if (inside := _nearest(context, bare, start)) >= 0:
            return f"without the white space around it, it begins at {inside}"
        flat = " ".join(context.split())
        if " ".join(text.split()) in flat:
            return "its white space is not that of the context; copy the answer from the context"
        if text.casefold() in context.casefold():
            return "its case is not that of the context; copy the answer from the context"
        return "the context does not have this text at all"
    before = context[:found]
    if len(before.encode("utf-8")) == start:
        return f"answer_start counts bytes; count characters: {found}"
    if len(before.encode("utf-16-le")) // 2 == start:
        return f"answer_start counts UTF-16 units, as JavaScript does; count code points: {found}"
    return f"it begins at {found}"


def _nearest(context: str, text: str, start: int) -> int:
    """The start of the text's nearest occurrence; -1 if there is none."""
    start = min(max(start, 0), len(context))
    before, behind = context.rfind(text, 0, start + len(text) - 1), context.find(text, start)
    if before < 0 or behind < 0:
        return max(before, behind)
    return behind if behind - start <= start - before else before
