"""Rows of JSON files, read strictly in constant memory: one object a line, or one array of objects."""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shardyard_trainer.data.bad_rows import refuse
from shardyard_trainer.data.containers import open_text
from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.lines import LONGEST_LINE_BYTES, not_utf8, read_lines
from shardyard_trainer.data.sources import DataFile

_DEEPEST = 64
_MOST_VALUES = 1_000_000
"""Values in one row at most: 16 MiB of `[],` would be half a gigabyte of Python lists."""

_MOST_DIGITS = 4300
"""Digits of an integer at most: Python refuses longer ones, with a message about its own settings."""

_CHUNK = 2**16
_SPACE = re.compile(r"[ \t\r\n]*")
# Possessive, and up to the end if a quote is never closed: linear, each character is matched once.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]++")
_NOT_COMMAS = re.compile(r"[^,]++")
_RECORDS = "write one object a line, or one list of objects (in pandas: to_json(path, orient='records', lines=True))"


def read_json_rows(file: DataFile, skip: Callable[[DataError], None] = refuse) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a file, each with its first line. Raises DataError with the line.

    A line that is not an object is given to `skip`; in a list of objects nothing can be skipped.
    """
    with open_text(file) as stream:
        start = _peek(stream)
        if start.startswith(b"["):
            yield from _Array(stream, file).rows()
            return
    for number, line in read_lines(file, skip=skip):
        if not line.strip():
            continue
        try:
            value = _object(line, file.name, number)
        except DataError as error:
            skip(error)
        else:
            yield number, value


def first_text(file: DataFile) -> str:
    """The first characters of a file, to see what it holds."""
    with open_text(file) as stream:
        return _peek(stream).decode("utf-8", "ignore")


def read_held_list(file: DataFile, key: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that is a list of them, or one object that has this list at `key`, in flat memory.

    Raises DataError with the line.
    """
    with open_text(file) as stream:
        is_list = _peek(stream).startswith(b"[")
        array = _Array(stream, file)
        for _, row in array.rows() if is_list else array.rows_of(key):
            yield row


def _peek(stream: io.BufferedReader) -> bytes:
    return stream.peek(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    _check_size(line, name, number)
    try:
        value = STRICT_JSON.decode(line)
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}{_next_step(line, error)}"
        raise DataError(message, file=name, line=number) from None
    except ValueError as error:
        raise DataError(f"not JSON: {error}", file=name, line=number) from None
    if not isinstance(value, dict):
        raise DataError('not a JSON object; each line must be one, such as {"text": …}', file=name, line=number)
    return value


def _check_size(text: str, name: str, number: int) -> None:
    """Raises DataError for nesting or numbers of values that would cost too much memory."""
    brackets, commas = text.count("[") + text.count("{"), text.count(",")
    if brackets <= _DEEPEST and commas <= _MOST_VALUES:
        return
    plain = _STRING.sub("", text)
    if brackets > _DEEPEST and _depth(plain) > _DEEPEST:
        message = f"JSON nested deeper than {_DEEPEST}; a row is an object of texts, numbers and lists of them"
        raise DataError(message, file=name, line=number)
    if commas > _MOST_VALUES and (found := len(_NOT_COMMAS.sub("", plain))) > _MOST_VALUES:
        message = f"{found:,} values in one row; at most {_MOST_VALUES:,}; write one object a line"
        raise DataError(message, file=name, line=number)


def _depth(plain: str) -> int:
    """How deep brackets are nested in a JSON text without its strings; no Python step for each character."""
    brackets = np.frombuffer(_NOT_BRACKETS.sub("", plain).encode(), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.cumsum(np.where(opening, 1, -1)).max(initial=0))


def _next_step(line: str, error: json.JSONDecodeError) -> str:
    stripped = line.strip()
    if error.msg.startswith("Extra data"):
        return "; write each object on a line of its own"
    if re.match(r"\{\s*'", stripped):
        return "; JSON has double quotes: write it with json.dumps, not with str"
    if error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated"):
        return f"; the object does not end on this line: if the file was cut short, copy it again; else {_RECORDS}"
    if re.search(r",\s*[}\]]", stripped):
        return "; remove the comma before the closing bracket"
    return "; check the quotes and commas there"


class _Array:
    """One array of objects, read object by object; at most one object is in memory."""

    def __init__(self, stream: io.BufferedReader, file: DataFile) -> None:
        self._stream = stream
        self._name = file.name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
        self._text = ""
        self._at = 0
        self._line = 1
        self._num_bytes = 0

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each object, with its line."""
        yield from self._elements()
        if self._next():
            raise self._error("something follows the list's `]`; a file is one list of objects, or one object a line")

    def _elements(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self._next()
        self._at += 1
        is_first = True
        while (character := self._next()) != "]":
            if not is_first:
                if character != ",":
                    what = "ends" if not character else f"continues with {shorten(character)!r}"
                    raise self._error(f"the list {what} where a comma or `]` is expected; {self._cut_or(character)}")
                self._at += 1
                character = self._next()
            if character == "]":
                raise self._error("there is a comma before the list's `]`; remove it")
            if character != "{":
                what = "the file ends inside the list" if not character else "not a JSON object"
                raise self._error(f"{what}; {self._cut_or(character)}")
            yield self._line, self._value()
            is_first = False
        self._at += 1

    def rows_of(self, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each object of the list that one object over the whole file has at `key`, with its line."""
        self._next()
        self._at += 1
        while (character := self._next()) not in ("}", ""):
            if character == ",":
                self._at += 1
                self._next()
            name = self._value()
            if not isinstance(name, str) or self._next() != ":":
                raise self._error("a key, a colon and its value are wanted; check the quotes and commas there")
            self._at += 1
            self._next()
            if name == key:
                yield from self._elements()
            else:
                self._value()
        if not character:
            raise self._error("the file ends inside its object; if it was cut short, copy it again")
        self._at += 1
        if self._next():
            raise self._error("something follows the object's `}`; a file is one such object")

    def _cut_or(self, character: str) -> str:
        if not character:
            return "if the file was cut short, copy it again"
        return "each element of the list must be an object, with a comma between two"

    def _next(self) -> str:
        """The next character that is not a space; an empty string at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            end = found.end() if found else self._at
            self._pass(end)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _pass(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _value(self) -> Any:
        while True:
            try:
                value, end = STRICT_JSON.raw_decode(self._text, self._at)
                # A number at the end of what was read may have more digits.
                if end < len(self._text) or isinstance(value, dict | list | str) or not self._more():
                    break
            except RecursionError:
                raise self._error(f"JSON nested deeper than {_DEEPEST}") from None
            except json.JSONDecodeError as error:
                # It may only end in data not read yet. Each retry reads twice as much, so the whole stays linear.
                place = error.pos - self._at
                if not self._more():
                    self._pass(place)
                    raise self._error(
                        f"not JSON: {error.msg.removesuffix(' starting at')}; {self._what_then(error.msg)}"
                    ) from None
            except ValueError as error:
                raise self._error(f"not JSON: {error}") from None
        _check_size(self._text[self._at : end], self._name, self._line)
        self._pass(end)
        return value

    def _what_then(self, complaint: str) -> str:
        if len(self._text) > LONGEST_LINE_BYTES:
            return f"an object may be {LONGEST_LINE_BYTES // 2**20} MiB long, and this one is broken or longer"
        if self._at >= len(self._text.rstrip()) or complaint.startswith("Unterminated"):
            return "the file ends inside it: if it was cut short, copy it again"
        return "check the quotes and commas there"

    def _more(self) -> bool:
        """Reads at least as much again as is buffered; False at the end of the file, or if too much is buffered."""
        if self._at:
            self._text, self._at = self._text[self._at :], 0
        if len(self._text) > LONGEST_LINE_BYTES:
            return False
        raw = self._read(max(_CHUNK, len(self._text)))
        try:
            self._text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            # The decoder kept a partial character of the last chunk, so its bytes count before this one.
            at = self._num_bytes + error.start - (len(error.object) - len(raw))
            self._line += self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise self._error(not_utf8(error.object[error.start], at)) from None
        self._num_bytes += len(raw)
        return bool(raw)

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except DataError as error:
            raise self._error(error.plain) from None

    def _error(self, message: str) -> DataError:
        return DataError(message, file=self._name, line=self._line)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number; write null, or leave the row out")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is too large for a number; quote it if it is text")
    return value


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(
            f"{shorten(text)} has {len(text):,} digits; a number has at most {_MOST_DIGITS:,}; quote it if it is text"
        )
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate key {shorten(name)!r}; rename one, or remove it")
            seen.add(name)
    return found


STRICT_JSON = json.JSONDecoder(
    parse_constant=_refuse, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique
)
"""JSON as rows may have it: finite numbers, and no key twice. Decoding raises ValueError, nesting RecursionError."""
