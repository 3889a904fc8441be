"""Sources and targets: two columns, a record of languages, or two aligned text files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, listed, nearest, shorten
from shardyard_trainer.data.lines import read_lines
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.data.records import Record, Role, of_region, read_records
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.written_lists import as_value
from shardyard_trainer.reading import about, reading

RECORD = "translation"
"""The role of a column whose cells have a text for each language."""

_PACKED, _PLAIN = ".gz", (".txt", ".text")


@dataclass(frozen=True)
class TextPair:
    """A source text and its target; neither is blank."""

    file: str
    line: int
    source: str
    target: str


@dataclass(frozen=True)
class PairNames:
    """The data's names for sources and targets, lower case: names of columns, and endings of text files.

    `languages` are the keys of a record, as they are written; empty: the data has no such records.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    languages: tuple[str, str] | None = None

    @property
    def layouts(self) -> tuple[tuple[Role, ...], ...]:
        """The layouts of columns that a file can have."""
        one, other = self.languages or ("", "")
        pair = (
            Role("source", self.sources, languages=(one,)),
            Role("target", self.targets, languages=(other,)),
        )
        return (pair, (Role(RECORD),)) if self.languages is not None else (pair,)

    def sides_of(self, ending: str) -> list[str]:
        """Which of `source` and `target` a file with this ending is, also if it names a region (`train.zh-CN`)."""
        sides = {"source": self.sources, "target": self.targets}
        found = [side for side, endings in sides.items() if ending in (side, *endings)]
        languages = zip(sides, self.languages or ("", ""), strict=True)
        return found or [side for side, language in languages if of_region(ending, language)]


def read_pairs(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    names: PairNames,
    *,
    field: str,
    bad: BadRows | None = None,
) -> Iterator[TextPair]:
    """Yields the pairs of all files in order. Raises DataError for `field`.

    Rows that cannot be used, such as those with a blank target, go to `bad`, if the caller has one and finishes it.
    """
    own, num_pairs = bad or BadRows(source), 0
    is_text = all(file.format == spec_pb2.DATA_FORMAT_TEXT for file in files)
    if is_text:
        rows = _aligned(files, source, names, own, field)
    else:
        rows = (_of_record(each, names) for each in read_records(files, source, names.layouts, field=field, bad=own))
    for make in rows:
        try:
            pair = make()
        except DataError as error:
            own.skip(error.at(field))
            continue
        num_pairs += 1
        yield pair
    if bad is None:
        own.finish(num_pairs, field)


def _of_record(record: Record, names: PairNames) -> Callable[[], TextPair]:
    def make() -> TextPair:
        cells = record.cells
        if RECORD in cells:
            found = _of_languages(record, names.languages or ("", ""))
        else:
            found = cells["source"], cells["target"]
        texts = [_text(cell, role, record) for cell, role in zip(found, ("source", "target"), strict=True)]
        return TextPair(record.file, record.line, *texts)

    return make


def _of_languages(record: Record, languages: tuple[str, str]) -> tuple[Any, Any]:
    cell = as_value(record.cells[RECORD])
    if not isinstance(cell, Mapping):
        form = ", ".join(f'"{language or name}": "…"' for language, name in zip(languages, ("en", "de"), strict=True))
        text = (
            f"`{RECORD}` is {shorten(repr(record.cells[RECORD]))}, which is not a record with a text for each "
            f"language; write it as {{{form}}}, or give the texts in two columns"
        )
        raise DataError(text, file=record.file, line=record.line)
    cell = _by_language(cell)
    found = []
    for language, name in zip(languages, ("source_language", "target_language"), strict=True):
        key = language if language in cell else _only_like(language, cell)
        if key is None:
            what = f"no text for {name} {shorten(language)!r}" if language else f"set {name}"
            raise DataError(
                f"`{RECORD}`: {what}; there are: {listed(map(str, cell))}{nearest(language, map(str, cell))}",
                file=record.file,
                line=record.line,
            )
        found.append(cell[key])
    return found[0], found[1]


def _by_language(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of languages, also if it is written as two lists: of the languages, and of the texts."""
    languages, said = cell.get("language"), cell.get("translation")
    if isinstance(languages, list) and isinstance(said, list) and len(languages) == len(said) == len(set(languages)):
        return dict(zip(languages, said, strict=True))
    return cell


def _only_like(language: str, cell: Mapping[str, Any]) -> str | None:
    """The only key that is a language in another case, or with a region (`en_XX`, `en-GB`); None if there is none."""
    wanted = language.casefold()
    same = [key for key in cell if str(key).casefold() == wanted]
    found = same or [key for key in cell if of_region(str(key), language)]
    return found[0] if len(found) == 1 else None


def _text(cell: Any, role: str, record: Record) -> str:
    """A cell as one text: a list of sentences is joined by spaces. Raises DataError."""

    def refuse(what: str) -> DataError:
        return DataError(f"the {role} {what}{record.also(role)}", file=record.file, line=record.line)

    if isinstance(cell, list) and all(isinstance(each, str) for each in cell):
        if role == "target" and len(cell) > 1:
            raise refuse(f"is a list of {len(cell)} texts; give one, in a row of its own")
        cell = " ".join(each.strip() for each in cell)
    if not isinstance(cell, str):
        kind = "missing" if cell is None else f"{shorten(repr(cell))}, which is not a text"
        raise refuse(f"is {kind}; fill it in, or remove the row")
    if not cell.strip():
        raise refuse("is empty; fill it in, or remove the row")
    if fault := unreadable(cell):
        raise refuse(f"has {fault}")
    return cell


def _aligned(
    files: Sequence[DataFile], source: spec_pb2.DataSource, names: PairNames, bad: BadRows, field: str
) -> Iterator[Callable[[], TextPair]]:
    """Yields the lines of pairs of text files."""
    for one, other in _pairs_of_files(files, source, names, field):
        about(field, "DATA_INVALID")
        reading(one.name)
        try:
            yield from _lines_together(one, other, bad, field)
        except DataError as error:
            raise error.at(field) from None


def _pairs_of_files(
    files: Sequence[DataFile], source: spec_pb2.DataSource, names: PairNames, field: str
) -> list[tuple[DataFile, DataFile]]:
    """Pairs files: as mapped, or by a common stem with the two endings. Raises DataError."""
    by_name = {file.name: file for file in files}
    if mapped := dict(source.columns):
        for role in ("source", "target"):
            if (name := mapped.get(role, "")) not in by_name:
                what = f"there is no file {shorten(name)!r}" if name else f"no file is named as {role}"
                raise DataError(
                    f"{what}; columns names the file of the sources and that of the targets; there are: "
                    f"{listed(by_name)}{nearest(name, by_name)}",
                    field=f"{field}.columns",
                )
        return [(by_name[mapped["source"]], by_name[mapped["target"]])]
    found: dict[str, dict[str, DataFile]] = {}
    for file in files:
        stem, ending = _stem_and_ending(file.name)
        for role in names.sides_of(ending):
            if (other := found.setdefault(stem, {}).setdefault(role, file)) is not file:
                raise DataError(
                    f"{shorten(other.name)!r} and {shorten(file.name)!r} may both be the {role}s of {shorten(stem)!r}; "
                    "leave one out, or name two files in columns (source: FILE, target: FILE)",
                    field=field,
                )
    alone = [next(iter(pair.values())).name for pair in found.values() if len(pair) == 1]
    if alone or not found:
        what = f"{shorten(alone[0])!r} has no partner" if alone else f"the texts have no targets ({listed(by_name)})"
        wanted = (
            "`.source` and `.target`"
            if names.languages is None
            else " and ".join(
                f"`.{language or role}`" for language, role in zip(names.languages, ("source", "target"), strict=True)
            )
        )
        raise DataError(
            f"{what}; give two files of one name that end in {wanted}, line by line, name two in columns "
            "(source: FILE, target: FILE), or give a table with both columns",
            field=field,
        )
    return [(pair["source"], pair["target"]) for pair in found.values()]


def _stem_and_ending(name: str) -> tuple[str, str]:
    """`a/train.en.txt.gz` → (`a/train`, `en`)."""
    path = Path(name.removesuffix(_PACKED))
    if path.suffix.lower() in _PLAIN:
        path = path.with_suffix("")
    return str(path.with_suffix("")), path.suffix[1:].casefold()


def _lines_together(one: DataFile, other: DataFile, bad: BadRows, field: str) -> Iterator[Callable[[], TextPair]]:
    """Yields lines of the same number; an unreadable line is skipped together with its partner."""
    lines = [_Lines(one, bad), _Lines(other, bad)]
    for pair in zip_longest(*lines):
        found = [each for each in pair if each is not None]
        if len(found) == 2 and None not in (texts := [text for _, text in found]):
            yield _of_lines(one, other, found[0][0], texts)
    counts = [each.count for each in lines]
    if counts[0] != counts[1]:
        raise DataError(
            f"{counts[0]:,} lines, but {other.name} has {counts[1]:,}; line by line the two must belong together: "
            "copy both again, and keep empty lines",
            file=one.name,
            field=field,
        )


def _of_lines(one: DataFile, other: DataFile, line: int, texts: Sequence[Any]) -> Callable[[], TextPair]:
    def make() -> TextPair:
        for file, text, role in ((one, texts[0], "source"), (other, texts[1], "target")):
            if not text.strip():
                raise DataError(
                    f"the {role} is empty; fill it in, or remove the line from both files", file=file.name, line=line
                )
        return TextPair(one.name, line, *texts)

    return make


class _Lines:
    """Yields all lines of a file in order, None for an unreadable one."""

    def __init__(self, file: DataFile, bad: BadRows) -> None:
        self._file = file
        self._bad = bad
        self.count = 0

    def __iter__(self) -> Iterator[tuple[int, str | None]]:
        skipped: list[int] = []

        def skip(error: DataError) -> None:
            self._bad.skip(error)
            skipped.append(error.line)

        for number, text in read_lines(self._file, skip=skip):
            while self.count + 1 < number:
                self.count += 1
                yield self.count, None
            self.count = number
            yield number, text
        for number in skipped:
            if number > self.count:
                self.count = number
                yield number, None
