"""Files with a word a line: `word … tag`, columns parted by spaces or tabs, a blank line behind each text."""

from __future__ import annotations

from collections.abc import Iterator

from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.lines import read_lines
from shardyard_trainer.data.sources import DataFile

DOCUMENT_START = "-DOCSTART-"
_MOST_WORDS = 2**16


def conll_rows(file: DataFile) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    """(line of its first word, (words, tags)) of each text. Raises DataError for a line without a tag."""
    words: list[str] = []
    tags: list[str] = []
    first = width = 0
    for number, line in read_lines(file):
        cells = line.split("\t") if "\t" in line else line.split()
        # `# sent_id = 3` is about a text; the word `#` has its tag behind it.
        is_remark = line.startswith("# ") and " = " in line and len(cells) != width
        if not line.strip() or cells[0] == DOCUMENT_START or is_remark:
            if words:
                yield first, (words, tags)
                words, tags = [], []
            continue
        if len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            message = f"{shorten(line.strip())!r} has no tag; write a word, spaces or a tab, and its tag"
            raise DataError(message, file=file.name, line=number)
        width = width or len(cells)
        if len(cells) != width:
            message = f"{len(cells)} columns, but the lines before have {width}; give each word the same columns"
            raise DataError(message, file=file.name, line=number)
        if not words:
            first = number
        elif len(words) == _MOST_WORDS:
            message = f"more than {_MOST_WORDS:,} words without a blank line; put one behind each text"
            raise DataError(message, file=file.name, line=number)
        words.append(cells[0].strip())
        tags.append(cells[-1].strip())
    if words:
        yield first, (words, tags)
