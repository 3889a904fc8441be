"""SQuAD's own JSON: `data` has articles, their paragraphs have a context and its questions (`qas`) with their answers.

Transformers' own examples keep such a `data` with a question in each of its objects; others keep its list alone. Both
are read too.

Articles are read one by one, so memory stays flat; a question's line is its number in the file, as files have one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.json_rows import first_text, read_held_list
from shardyard_trainer.data.records import Record
from shardyard_trainer.data.sources import DataFile

_KEY = "data"
# Plain values alone may come before `data`, unless paragraphs follow.
_BEGINS = re.compile(
    r"""\{\s*(?:"[^"\\]*+"\s*:\s*(?:"(?:[^"\\]|\\.)*+"|[^\s"{}\[\],]++)\s*,\s*)*+"data"\s*:\s*\[\s*[{\]]""", re.DOTALL
)
_DATA, _PARAGRAPHS = (re.compile(rf'(?<!\\)"{name}"\s*:\s*\[\s*[{{\]]') for name in ("data", "paragraphs"))


def is_nested(file: DataFile) -> bool:
    """Whether a file has this form, whatever its name."""
    if file.format != spec_pb2.DATA_FORMAT_JSONL:
        return False
    start = first_text(file)
    if _BEGINS.match(start):
        return True
    return bool(_PARAGRAPHS.search(start) and (start.startswith("[") or _DATA.search(start)))


def read_nested(file: DataFile) -> Iterator[Record]:
    """Yields the questions of a file, each as a row with its context. Raises DataError."""
    number = 0
    for article in read_held_list(file, _KEY):
        if "question" in article:
            number += 1
            yield _record(file, number, article, article.get("context"))
            continue
        for paragraph in _list(article, "paragraphs", "an article", file, number):
            context = paragraph.get("context")
            for question in _list(paragraph, "qas", "a paragraph", file, number):
                number += 1
                yield _record(file, number, question, context)
    if not number:
        raise DataError("no article has a question; `data` is a list of articles with paragraphs", file=file.name)


def _record(file: DataFile, number: int, question: dict[str, Any], context: Any) -> Record:
    cells = {name: question.get(name) for name in ("id", "question", "answers", "is_impossible")}
    return Record(file.name, number, {**cells, "context": context})


def _list(holder: dict[str, Any], key: str, what: str, file: DataFile, number: int) -> list[dict[str, Any]]:
    found = holder.get(key)
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        return found
    message = f"{what} after {number:,} questions has no list of objects as `{key}`"
    raise DataError(f"{message}; SQuAD's form is data, paragraphs, qas", file=file.name)
