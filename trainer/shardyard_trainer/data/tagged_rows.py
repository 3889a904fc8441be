"""Rows of tagged words as people write them: lists of words and tags, or a text with spans of its characters."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, listed, nearest, shorten
from shardyard_trainer.data.labels import unfit
from shardyard_trainer.data.records import Record, Role, read_records
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.tags import OUTSIDE, parts
from shardyard_trainer.data.word_split import split_words
from shardyard_trainer.data.written_lists import as_list, shown

WORDS = (
    Role("tokens", ("words", "token", "word")),
    Role("tags", ("ner_tags", "pos_tags", "labels", "ner", "tag", "ner_tag")),
    Role("text_id", ("sentence_id", "sentence #", "sent_id", "sentence_idx"), is_optional=True),
)
SPANS = (Role("text", ("sentence",)), Role("spans", ("entities", "annotations", "label", "labels")))

# Names that annotation tools use for the parts of a span.
_STARTS, _ENDS = ("start", "start_offset"), ("end", "end_offset")
_NAMES = ("label", "type", "entity", "labels")

_MOST_WORDS = 2**16
_NUMBER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class TaggedText:
    """The words of one text with their tags as written."""

    file: str
    line: int
    words: list[str]
    tags: list[str]


class TagNames:
    """The tags given in a spec, by their numbers; empty: any tag is accepted."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        kinds = {parts(name)[1] for name in names} - {""}
        marked = {f"{mark}-{kind}" for kind in kinds for mark in "BIESLUM"}
        self._taken = {*names, *marked, *({OUTSIDE} if kinds else ())}

    def of(self, tags: Sequence[Any], numbered: Sequence[str] = ()) -> list[str]:
        """Translates tags written as names or numbers to names. Raises ValueError.

        `numbered` are the names of the numbers in the file itself.
        """
        read = [self._name_or_number(at, tag) for at, tag in enumerate(tags)]
        numbers = [tag for tag in read if isinstance(tag, int)]
        if not numbers:
            return [self._check(tag) for tag in read if isinstance(tag, str)]
        if len(numbers) < len(read):
            raise ValueError("some tags are numbers and others names; write all as one of them")
        names, where = (numbered, "the file") if numbered else (self.names, "labels")
        if not names:
            raise ValueError("the tags are numbers; say which tags they are in labels, in the order of the numbers")
        for number in numbers:
            if not 0 <= number < len(names):
                there = f"{where} has {len(names)} names, for 0 to {len(names) - 1}"
                # What training loops write for tokens without a label.
                then = "; give the words of texts and their tags, not the tokens of a tokenizer" * (number == -100)
                raise ValueError(f"the tag {shorten(str(number))}, but {there}{then}")
        return [self._check(names[number]) for number in numbers]

    def _name_or_number(self, at: int, tag: Any) -> str | int:
        if isinstance(tag, float | np.floating) and float(tag).is_integer():
            return int(tag)
        if isinstance(tag, int | np.integer) and not isinstance(tag, bool):
            return int(tag)
        if not isinstance(tag, str | bool):
            raise ValueError(f"tag {at + 1} is {shown(tag)}; give each word the name of a tag, or its number")
        name = str(tag).strip()
        if name not in self.names and len(name) < 20 and _NUMBER.fullmatch(name):
            return int(name)
        return name

    def _check(self, tag: str) -> str:
        if tag in self._taken:
            return tag
        if self.names:
            message = f"the tag {shorten(tag)!r} is none of labels: {listed(self.names)}{nearest(tag, self.names)}"
            raise ValueError(message)
        rule = unfit(tag) if tag else f"it is empty; write {OUTSIDE} for a word outside entities"
        if rule:
            raise ValueError(f"the tag {shorten(tag)!r}: {rule}")
        self._taken.add(tag)
        return tag


def read_tagged(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    *,
    names: Sequence[str],
    field: str,
    bad: BadRows | None = None,
) -> Iterator[TaggedText]:
    """Words with their tags, from lists of both, from rows of one word, or from texts with spans. Raises DataError.

    `names` are the tags by their numbers, for data that has numbers. Texts that cannot be used go to `bad`, if the
    caller has one and finishes it.
    """
    known, own = TagNames(names), bad or BadRows(source)
    longest = num_texts = 0
    first: Record | None = None
    for rows in _by_text(read_records(files, source, (WORDS, SPANS), field=field, bad=own), own):
        try:
            text = _text(rows, known, field)
        except DataError as error:
            own.skip(error)
            continue
        longest, num_texts = max(longest, len(text.words)), num_texts + 1
        first = first or rows[0]
        yield text
    if longest == 1 and num_texts > 1 and first and _is_plain_word(first.cells.get("tokens")):
        message = (
            "each text has one word; put all words of a text into one row, as lists, or map the column that tells "
            "the texts apart in columns.text_id, or write a word a line into a .conll file"
        )
        raise DataError(message, file=first.file, line=first.line, field=field)
    if bad is None:
        own.finish(num_texts, field)


def _is_plain_word(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.lstrip().startswith(("[", "("))


def _by_text(records: Iterable[Record], bad: BadRows) -> Iterator[list[Record]]:
    """The rows of each text: one row, or consecutive rows with the same `text_id` or without one.

    A text that lacks a bad row is bad as a whole.
    """
    rows: list[Record] = []
    is_whole = True
    seen: set[tuple[str, str]] = set()
    for record in records:
        own = _id(record)
        goes_on = rows and "text_id" in record.cells and record.file == rows[0].file and own in ("", _id(rows[0]))
        if goes_on and any((record.file, line) in bad.places for line in range(rows[-1].line + 1, record.line)):
            is_whole = False
        if rows and not goes_on:
            if is_whole:
                yield rows
            rows, is_whole = [], True
        if not rows and own:
            if (record.file, own) in seen:
                message = f"text_id {shorten(own)!r} appears again after another text; keep its rows together"
                raise DataError(message, file=record.file, line=record.line)
            seen.add((record.file, own))
        if len(rows) == _MOST_WORDS:
            message = f"more than {_MOST_WORDS:,} rows with the same text_id; give each text an id of its own"
            raise DataError(message, file=record.file, line=record.line)
        rows.append(record)
    if rows and is_whole:
        yield rows


def _id(record: Record) -> str:
    value = record.cells.get("text_id")
    return "" if value is None else str(value).strip()


def _text(rows: Sequence[Record], known: TagNames, field: str) -> TaggedText:
    words: list[str] = []
    tags: list[str] = []
    for record in rows:
        try:
            if "spans" in record.cells:
                found = _of_spans(record, known)
            else:
                found = _of_lists(record, known) if len(rows) == 1 else _of_word(record, known)
            if len(found[0]) != len(found[1]):
                raise ValueError(f"{len(found[0])} tokens, but {len(found[1])} tags; give each token a tag")
        except ValueError as error:
            raise DataError(str(error), file=record.file, line=record.line, field=field) from None
        words += found[0]
        tags += found[1]
    return TaggedText(rows[0].file, rows[0].line, words, tags)


def _of_lists(record: Record, known: TagNames) -> tuple[list[str], list[str]]:
    words = [_word(word, f"token {at + 1}") for at, word in enumerate(as_list(record.cells["tokens"], "tokens"))]
    return words, known.of(as_list(record.cells["tags"], "tags"), record.names.get("tags", ()))


def _of_word(record: Record, known: TagNames) -> tuple[list[str], list[str]]:
    """A row of one word, with its tag."""
    return [_word(record.cells["tokens"], "the word")], known.of([record.cells["tags"]], record.names.get("tags", ()))


def _word(word: Any, what: str) -> str:
    if not isinstance(word, str | int | float | np.number) or isinstance(word, bool):
        raise ValueError(f"{what} is {shown(word)}; give each word as text")
    return str(word)


def _of_spans(record: Record, known: TagNames) -> tuple[list[str], list[str]]:
    """Words of a text, tagged with the spans of characters that cover them."""
    text = record.cells["text"]
    if not isinstance(text, str):
        raise ValueError(f"the text is {shown(text)}; give a string")
    places = split_words(text)
    starts, ends = [first for first, _ in places], [last for _, last in places]
    tags = [OUTSIDE] * len(places)
    # An identical second span is the same annotation made twice.
    for start, end, label in dict.fromkeys(_span(span, text) for span in _spans(record.cells["spans"])):
        covered = range(bisect_right(ends, start), bisect_left(starts, end))
        what = f"the span {start} to {end} ({shorten(label)})"
        if not covered:
            raise ValueError(f"{what} covers no word")
        _refuse_part(what, text, start, end, (places[covered[0]], places[covered[-1]]))
        if any(tags[at] != OUTSIDE for at in covered):
            raise ValueError(f"{what} overlaps with another; leave one out")
        for at in covered:
            tags[at] = f"{'B' if at == covered[0] else 'I'}-{label}"
    return [text[first:last] for first, last in places], known.of(tags)


def _refuse_part(what: str, text: str, start: int, end: int, around: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Raises ValueError for a span that cuts a word: offsets in bytes, or an end that is one too small."""
    (first, first_end), (last_start, last) = around
    for is_part, verb, word in (
        (start > first, "begins", (first, first_end)),
        (end < last, "ends", (last_start, last)),
    ):
        if is_part:
            inside = f"{shorten(text[slice(*word)])!r} ({word[0]} to {word[1]})"
            raise ValueError(
                f"{what} {verb} inside the word {inside}; count in characters, with the end after the last "
                "one, and take whole words; or give tokens and tags"
            )


def _spans(cell: Any) -> list[Any]:
    if isinstance(cell, Mapping) and all(isinstance(value, list) for value in cell.values()):
        # One dict of lists, as the library datasets writes a sequence of records.
        rows = list(zip(*cell.values(), strict=False))
        if all(len(value) == len(rows) for value in cell.values()):
            return [dict(zip(cell, row, strict=True)) for row in rows]
    return as_list(cell, "spans")


def _span(span: Any, text: str) -> tuple[int, int, str]:
    if isinstance(span, Mapping):
        start, end, label = (_first(span, keys) for keys in (_STARTS, _ENDS, _NAMES))
        label = label[0] if isinstance(label, list) and len(label) == 1 else label
    elif isinstance(span, list | tuple) and len(span) in (3, 4):
        start, end, label = span[:3]
    else:
        raise ValueError(f"the span {shown(span)} is not {{start, end, label}}")
    start, end = (int(each) if isinstance(each, float) and each.is_integer() else each for each in (start, end))
    if type(label) is int:
        raise ValueError(f"the span {shown(span)}: label is a number; export the names of labels, not their numbers")
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label.strip():
        raise ValueError(f"the span {shown(span)}: start and end are whole numbers, label is a name")
    if not 0 <= start < end <= len(text):
        where = f"{shorten(str(start))} to {shorten(str(end))}"
        raise ValueError(f"the span {where} is not inside the text's {len(text)} characters")
    if parts(label.strip())[0] in ("B", "I"):
        raise ValueError(f"the span {start} to {end} ({shorten(label)}): name the kind alone, without B- or I-")
    said = span.get("text") if isinstance(span, Mapping) else span[3] if len(span) > 3 else None
    if isinstance(said, str) and said.strip() != text[start:end].strip():
        there = f"the text has {shorten(text[start:end])!r} from {start} to {end}"
        raise ValueError(f"the span says {shorten(said)!r}, but {there}; count in characters")
    return start, end, label.strip()


def _first(span: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((span[key] for key in keys if key in span), None)
