"""Rows of delimited files, read strictly: quoting as in RFC 4180 and as spreadsheets write it."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from shardyard_trainer.data.bad_rows import refuse
from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.lines import LONGEST_LINE_BYTES, read_lines
from shardyard_trainer.data.sources import DataFile

_LOOKED_AT = 200
_HEAD_CHARACTERS = 2**23
_EXCEL_SEPARATOR = re.compile(r"(\"?)sep=(.)\1\s*", re.IGNORECASE)
_ODD_QUOTES = "“”„«»"


def read_csv_rows(
    file: DataFile, delimiter: str, skip: Callable[[DataError], None] = refuse
) -> Iterator[tuple[int, list[str]]]:
    """Yields each row with its first line. An empty `delimiter` means the one in a first line `sep=;`, else a comma.

    A row with wrong quotes is given to `skip`.
    """
    # The csv module has one limit for the whole process; every reader here needs this one.
    csv.field_size_limit(LONGEST_LINE_BYTES)
    lines: Iterator[str] = (line for _, line in read_lines(file, keep_ends=True))
    before = 0
    first = next(lines, None)
    if first is None:
        return
    if said := _EXCEL_SEPARATOR.fullmatch(first):
        # Excel obeys this line and does not show it.
        delimiter, before = delimiter or said[2], 1
    else:
        lines = chain([first], lines)
    delimiter = delimiter or ","
    head = list(_head(lines))
    rows = _Rows(chain(head, lines), file, delimiter, before, skips_spaces=_has_spaced_quotes(head, delimiter))
    yield from rows.read(skip)


def read_tsv_rows(
    file: DataFile, delimiter: str, skip: Callable[[DataError], None] = refuse
) -> Iterator[tuple[int, list[str]]]:
    """Yields each line split at the delimiter (empty: a tab); quotes are ordinary characters."""
    looked_at = 0
    for number, line in read_unix_lines(file, skip):
        if not line:
            continue
        cells = line.split(delimiter or "\t")
        quoted = next(filter(_is_quoted, cells), None) if looked_at < _LOOKED_AT else None
        if looked_at == 0 and len(cells) > 1 and all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
            quoted = cells[0]
        if quoted is not None:
            raise DataError(
                f"{shorten(quoted)} is quoted, and TSV is read without quoting: give format CSV and a tab as delimiter",
                file=file.name,
                line=number,
                value=quoted,
            )
        looked_at += 1
        yield number, cells


def read_unix_lines(file: DataFile, skip: Callable[[DataError], None] = refuse) -> Iterator[tuple[int, str]]:
    """Yields lines. Raises DataError if they end with a lone CR (old spreadsheets): the file would be one line."""
    lines = read_lines(file, skip=skip)
    head = list(islice(lines, 2))
    if len(head) == 1 and "\r" in head[0][1]:
        message = "lines end with a lone CR, as old spreadsheets write them; save the file with LF or CRLF ends"
        raise DataError(message, file=file.name, line=1)
    return chain(head, lines)


def width_hint(cells: list[str], num_columns: int, delimiters: str) -> str:
    """The next step for a CSV row that is wider than its header."""
    if num_columns == 1:
        found = (f"`{other}`" for other in delimiters if any(other in cell for cell in cells))
        return f"; is {next(found, 'another character')} between the columns? give it as delimiter"
    if not any(cell.strip() for cell in cells[num_columns:]):
        return "; the row ends with a delimiter: remove it, or give the column a name in the header"
    if any(quote in cell for cell in cells for quote in _ODD_QUOTES):
        return '; “ and ” are not quotes to CSV: write " around a value that has the delimiter in it'
    return "; a value that has the delimiter in it must be quoted"


class _Rows:
    def __init__(
        self, lines: Iterable[str], file: DataFile, delimiter: str, before: int, *, skips_spaces: bool
    ) -> None:
        self._file = file
        self._before = before
        self._skips_spaces = skips_spaces
        self._spaced_quote = f'{delimiter} "'
        self._has_spaced_quote = False
        self._delimiter = delimiter
        self._lines: list[str] = []
        self._reader = csv.reader(self._watched(lines), delimiter=delimiter, strict=True, skipinitialspace=skips_spaces)

    def read(self, skip: Callable[[DataError], None]) -> Iterator[tuple[int, list[str]]]:
        while True:
            began = self._reader.line_num + 1
            self._has_spaced_quote = False
            self._lines.clear()
            try:
                row = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                message = _complaint(str(error), self._reader.line_num - began, self._lines[-1] if self._lines else "")
                skip(DataError(message, file=self._file.name, line=began + self._before))
                continue
            if self._has_spaced_quote and _has_spaced_quotes(self._lines, self._delimiter):
                skip(
                    DataError(
                        "a quote after a space quotes nothing, although it did in the rows before; remove the space",
                        file=self._file.name,
                        line=began + self._before,
                    )
                )
            elif row:
                yield began + self._before, row

    def _watched(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self._lines.append(line)
            if not self._skips_spaces and self._spaced_quote in line:
                self._has_spaced_quote = True
            yield line


def _head(lines: Iterator[str]) -> Iterator[str]:
    """The file's first lines: enough to see how it is written, bounded in number and size."""
    size = 0
    for line in islice(lines, _LOOKED_AT):
        yield line
        size += len(line)
        if size > _HEAD_CHARACTERS:
            return


def _has_spaced_quotes(head: list[str], delimiter: str) -> bool:
    """Whether the file writes `a, "b, c"`: with the space as part of the value, its quotes would not quote anything.

    Both readings of the same lines are compared: a quoted value may hold such a thing itself.
    """
    if delimiter == " " or not any(f'{delimiter} "' in line for line in head):
        return False
    spaced = _parsed(head, delimiter, skips_spaces=True)
    plain = _parsed(head, delimiter, skips_spaces=False)
    return spaced is not None and spaced != [[cell.lstrip(" ") for cell in row] for row in plain or []]


def _parsed(head: list[str], delimiter: str, *, skips_spaces: bool) -> list[list[str]] | None:
    rows: list[list[str]] = []
    try:
        for row in csv.reader(head, delimiter=delimiter, strict=True, skipinitialspace=skips_spaces):
            rows.append([cell.lstrip(" ") for cell in row])
    except csv.Error as error:
        # The last value of the head may continue after it.
        if "unexpected end" not in str(error):
            return None
    return rows


def _is_quoted(cell: str) -> bool:
    """Whether a cell is quoted and contains quotes, all of them doubled."""
    inside = cell[1:-1]
    is_framed = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return is_framed and '""' in inside and '"' not in inside.replace('""', "")


def _complaint(error: str, more_lines: int, last: str) -> str:
    place = f", {more_lines:,} lines on" if more_lines > 0 else ""
    if "unexpected end" in error:
        return (
            'a quote that opens here is never closed; double a quote inside a quoted value, as in "say ""hi"""; '
            "if the file was cut short, copy it again"
        )
    if "field larger" in error:
        return (
            f"a value that begins here is longer than {LONGEST_LINE_BYTES // 2**20} MiB{place}: break the text into "
            "rows; if it should have ended before, a quote of it is not closed"
        )
    if "expected after" in error:
        if re.search(r'"\s+(\W|$)', last):
            return f"a space follows a closing quote{place}; remove it, or double a quote inside a quoted value"
        if '\\"' in last:
            return f'a quote inside a value is written `\\"`{place}; CSV doubles it, as in "say ""hi"""'
        return f"something follows a closing quote{place}; double a quote inside a quoted value"
    if "universal-newline" in error:
        return (
            "lines end with a lone CR, as old spreadsheets write them; save the file with LF or CRLF ends, or quote "
            "the value"
        )
    return f"not CSV: {error}; write it with a CSV library"
