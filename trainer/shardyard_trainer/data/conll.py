"""Files with one word a line: `word … tag`, columns separated by spaces or tabs, a blank line after each text.

CoNLL-U and its like are read too: remarks (`# sent_id = 3`), a first column that counts the words, and lines about
parts of words (`1-2`, `8.1`), which are not counted as words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from shardyard_trainer.data.bad_rows import refuse
from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.lines import read_lines
from shardyard_trainer.data.sources import DataFile

DOCUMENT_START = "-DOCSTART-"
_MOST_WORDS = 2**16
_MOST_COLUMNS = 64
_BLANKS = " \t\r"
_REMARK = re.compile(r"#\s+(?:newdoc|newpar|sent_id|id|text|global\.columns)\b")
_PART = re.compile(r"[0-9]+[-.][0-9]+")


class ConllFile:
    """The columns of a file, and its texts.

    `words` is the place of the column of words: the first, or the second if the first one counts them. Raises DataError
    for a file without words; a text with a line that has not as many columns as the others is given to `skip`.
    """

    def __init__(self, file: DataFile, skip: Callable[[DataError], None] = refuse) -> None:
        self._file = file
        self._skip = skip
        self.width = self._width()
        head = next(self._texts(lambda error: None), None)
        self.words = int(self.width > 2 and head is not None and _counts(head[1][0]))

    def texts(self) -> Iterator[tuple[int, list[list[str]]]]:
        """(line of its first word, the cells of each column) of each text."""
        for line, columns in self._texts(self._skip):
            kept = [at for at, cell in enumerate(columns[0]) if not (self.words and _PART.fullmatch(cell))]
            yield line, [[column[at] for at in kept] for column in columns]

    def _width(self) -> int:
        """The number of columns, taken from the first line that is not a comment."""
        for _, line in read_lines(self._file, skip=lambda error: None):
            cells = _split(line)
            if cells and cells[0] != DOCUMENT_START and not cells[0].startswith("#"):
                return len(cells)
        return 2

    def _texts(self, skip: Callable[[DataError], None]) -> Iterator[tuple[int, list[list[str]]]]:
        rows: list[list[str]] = []
        first = 0
        wrong: DataError | None = None

        def note(error: DataError) -> None:
            nonlocal wrong
            wrong = wrong or error

        for number, line in chain(read_lines(self._file, skip=note), [(0, "")]):
            cells = _split(line)
            if not cells or cells[0] == DOCUMENT_START or self._is_remark(line, cells, rows):
                if wrong is not None:
                    skip(wrong)
                elif rows:
                    yield first, _columns(rows)
                rows, wrong = [], None
            elif error := self._fault(cells, number, len(rows)):
                note(error)
            else:
                first = first if rows else number
                rows.append(cells)

    def _is_remark(self, line: str, cells: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
        """A comment such as `# sent_id = 3`; a word `#` is followed by its tag instead."""
        if not line.startswith("#"):
            return False
        return len(cells) != self.width or (not rows and bool(_REMARK.match(line)))

    def _fault(self, cells: Sequence[str], number: int, num_words: int) -> DataError | None:
        message = ""
        if len(cells) < 2 or not cells[0]:
            message = f"{shorten(' '.join(cells))!r} has no tag; write a word, spaces or a tab, and its tag"
        elif len(cells) > _MOST_COLUMNS:
            message = f"{len(cells):,} columns; at most {_MOST_COLUMNS}; write a word a line, followed by its tag"
        elif len(cells) != self.width:
            message = f"{len(cells)} columns, but the lines before have {self.width}; give each word the same columns"
        elif num_words == _MOST_WORDS:
            message = f"more than {_MOST_WORDS:,} words without a blank line; put one after each text"
        return DataError(message, file=self._file.name, line=number) if message else None


def _split(line: str) -> list[str]:
    """The cells of a line, split at tabs or spaces only: a word may contain other white space (`10\u00a0000`)."""
    written = line.rstrip(_BLANKS)
    if not written.strip():
        return []
    parts = written.split("\t") if "\t" in written else written.split(" ")
    cells = [cell.strip(_BLANKS) for cell in parts]
    return cells if "\t" in written else [cell for cell in cells if cell]


def _columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _counts(cells: Sequence[str]) -> bool:
    """Whether the cells number the words of a text, from 0 or 1."""
    numbers = [cell for cell in cells if not _PART.fullmatch(cell)]
    return any(numbers == [str(first + at) for at in range(len(numbers))] for first in (0, 1))
