"""The inputs of `predict` and `embed`: arguments, a file, or stdin."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_inputs(texts: Sequence[str] | None, file: Path | None, *, pairs: bool) -> list[Any]:
    """The texts or pairs, in order.

    Raises: BadParameter, with the line number if a line is wrong.
    """
    if texts:
        if not pairs:
            return list(texts)
        if len(texts) % 2:
            raise typer.BadParameter("a pair is two texts; give a second one for each")
        return list(zip(texts[::2], texts[1::2], strict=True))
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter("give texts, --file, or one text a line on stdin")
    try:
        raw = file.read_bytes() if file is not None else sys.stdin.buffer.read()
    except OSError as error:
        raise typer.BadParameter(f"`{file}` cannot be read: {error.strerror}") from None
    lines = list(_lines(raw))
    return [_pair(number, line) for number, line in enumerate(lines, start=1)] if pairs else lines


def read_instances(
    kinds: Sequence[str],
    texts: Sequence[str] | None,
    file: Path | None,
    *,
    pairs: bool,
    asked: tuple[str | None, str | None] = (None, None),
    messages: Sequence[str] | None = None,
) -> list[Any]:
    """What to ask a model that takes these kinds of input (`Model.inputs`): the first, its usual one, decides.

    `asked` is a question and its context; `messages` are one conversation, each `ROLE: TEXT`. Raises: BadParameter,
    with the line number if a line is wrong.
    """
    if messages:
        if texts or file is not None or pairs:
            raise typer.BadParameter("--message gives one conversation; leave the texts, --file and --pairs out")
        return [[_message(each) for each in messages]]
    usual = kinds[0] if kinds else ""
    if usual == "question":
        return read_questions(texts, file, *asked)
    if asked != (None, None):
        taken = f"this one takes {' or '.join(kinds)}" if kinds else "this one predicts nothing"
        raise typer.BadParameter(f"--question and --context are for models that answer questions; {taken}")
    if usual == "items":
        return read_histories(texts, file)
    inputs = read_inputs(texts, file, pairs=pairs or usual == "pair")
    if usual == "messages" and not texts and not pairs:
        return [_conversation(number, line) for number, line in enumerate(inputs, start=1)]
    return as_pictures(inputs) if usual == "image" else inputs


def read_embedded(kinds: Sequence[str], texts: Sequence[str] | None, file: Path | None, *, pairs: bool) -> list[Any]:
    """What to get vectors of, from a model that predicts from these kinds of input.

    A model that predicts nothing does not say what it reads: files with the endings of pictures are pictures then.
    Raises: BadParameter, with the line number if a line is wrong.
    """
    inputs = read_inputs(texts, file, pairs=pairs)
    paths = [Path(item) for item in inputs if isinstance(item, str)]
    are_files = [path.is_dir() or (path.suffix.lower() in _PICTURES and path.is_file()) for path in paths]
    is_guess = not kinds and len(paths) == len(inputs) > 0 and all(are_files)
    return as_pictures(inputs) if is_guess or "image" in kinds else inputs


def _message(written: str) -> dict[str, str]:
    role, colon, content = written.partition(":")
    if not colon or not role.strip().isalpha():
        raise typer.BadParameter(f"--message {written!r} is not ROLE: TEXT, such as `user: Hello`")
    return {"role": role.strip(), "content": content.strip()}


def _conversation(number: int, line: str) -> Any:
    """A line of JSON as the messages of a conversation, with its tools if it has any; any other is a user's text."""
    if not line.lstrip().startswith(("[", "{")):
        return line
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return line
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise typer.BadParameter(f"line {number}: a conversation is a list of messages, or an object with `messages`")
    tools = found.get("tools") if isinstance(found, dict) else None
    return {"messages": messages, "tools": tools} if tools else messages


def read_histories(items: Sequence[str] | None, file: Path | None) -> list[Any]:
    """Histories of items: the arguments are one; of a file or of stdin each line is one, its items separated by
    tabs if there are any, else by spaces.

    Raises: BadParameter, with the line number if a line is wrong.
    """
    from shardyard.types import Items

    if items:
        return [Items(list(items))]
    lines = read_inputs(None, file, pairs=False)
    return [
        Items([item for each in line.split("\t" if "\t" in line else None) if (item := each.strip())]) for line in lines
    ]


def read_questions(
    texts: Sequence[str] | None, file: Path | None, question: str | None, context: str | None
) -> list[Any]:
    """Questions with their contexts: one of options, or of two arguments each; of a file or stdin each line is one, as
    JSON with both or separated by a tab.

    Raises: BadParameter, with the line number if a line is wrong.
    """
    from shardyard.types import Question

    if question is not None or context is not None:
        if question is None or context is None or texts or file:
            raise typer.BadParameter("give --question and --context together, and nothing else to ask")
        return [Question(question, _content(context))]
    if texts and len(texts) % 2:
        raise typer.BadParameter("each question needs its context after it: give both as two texts, or use --context")
    if texts:
        return [Question(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return [_question(number, line) for number, line in enumerate(read_inputs(None, file, pairs=False), start=1)]


def _content(context: str) -> str:
    """The text, or with an @ that of a file."""
    if not context.startswith("@"):
        return context
    try:
        return Path(context[1:]).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise typer.BadParameter(f"`{context[1:]}` cannot be read: {why}") from None


def _question(number: int, line: str) -> Any:
    from shardyard.types import Question

    if not line.lstrip().startswith("{"):
        return Question(*_pair(number, line))
    try:
        found = json.loads(line)
        return Question(found["question"], found["context"])
    except (ValueError, LookupError, RecursionError) as error:
        what = f"has no {error}" if isinstance(error, LookupError) else f"is not JSON: {error}"
        message = f'line {number}: {what}; write {{"question": "...", "context": "..."}}'
        raise typer.BadParameter(message) from None


def as_pictures(inputs: Sequence[Any]) -> list[Path]:
    """Paths of pictures, those of a folder sorted by name.

    Raises: BadParameter for pairs, and for a folder without pictures.
    """
    found: list[Path] = []
    for item in inputs:
        if not isinstance(item, str):
            raise typer.BadParameter("the model takes pictures; leave --pairs out, and give paths of files")
        path = Path(item)
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(each for each in path.iterdir() if each.suffix.lower() in _PICTURES and each.is_file())
        if not inside:
            raise typer.BadParameter(f"the folder `{path}` has no pictures ({', '.join(_PICTURES)})")
        found += inside
    return found


def _lines(raw: bytes) -> Iterator[str]:
    """The lines of a UTF-8 file. Only a line feed ends one: texts may contain Python's other line ends."""
    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"line {number}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from None
        if text:
            yield text
        elif raw.strip(b"\r\n"):  # A file of nothing but line ends has no texts.
            raise typer.BadParameter(f"line {number}: is blank, but every line has an answer; remove it")


def _pair(number: int, line: str) -> tuple[str, ...]:
    pair = tuple(line.split("\t"))
    if len(pair) != 2:
        raise typer.BadParameter(f"line {number}: a pair is two texts separated by a tab; write both in the line")
    return pair
