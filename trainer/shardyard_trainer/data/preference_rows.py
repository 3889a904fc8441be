"""Preferences in the layouts people use: a prompt with the answer that is chosen and the one that is rejected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any, NamedTuple

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.chat_turns import (
    ASSISTANT,
    FIRST_ROLES,
    SYSTEM,
    USER,
    Message,
    TurnFault,
    check_turns,
    read_messages,
    unread_in,
)
from shardyard_trainer.data.conversations import (
    BESIDE,
    HISTORY,
    MOST_MESSAGES,
    Conversation,
    read_history,
    read_list,
    read_question,
    read_system,
    read_text,
    read_tools,
)
from shardyard_trainer.data.records import Record, Role, RowFault, read_as
from shardyard_trainer.data.sources import DataFile

SIDES = ("chosen", "rejected")
_REJECTED = Role("rejected", ("rejected_response", "response_rejected", "rejected_messages", "non_preferred_output"))
_SIDES = (Role("chosen", ("chosen_response", "response_chosen", "preferred_output")), _REJECTED)
_WITH_PROMPT = (*_SIDES, *BESIDE, HISTORY)
LAYOUTS = (
    (
        Role("prompt", ("question", "query", "instruction", "conversations", "conversation")),
        Role("input", ("context",), is_optional=True),
        *_WITH_PROMPT,
    ),
    (Role("prompt", ("input",)), *_WITH_PROMPT),
    (Role("prompt", ("messages",)), *_WITH_PROMPT),
    (*_SIDES, *BESIDE),
    (Role("chosen", ("messages", "conversations", "conversation")), _REJECTED, *BESIDE),
)
ROLES = tuple(dict.fromkeys(role.name for layout in LAYOUTS for role in layout))

_OF_MESSAGES = ("role", "from", "content", "value")
"""Keys by which a record is known to be a message."""

# The transcripts of the first data sets of preferences (Bai et al., 2022).
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": USER, "Assistant": ASSISTANT}


class Pair(NamedTuple):
    """A row: the same messages, answered in the way that is chosen, and in the one that is rejected."""

    chosen: Conversation
    rejected: Conversation


def read_preferences(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, field: str, bad: BadRows | None = None
) -> Iterator[Pair]:
    """Yields the pairs of all files. Raises DataError.

    Rows that cannot be used go to `bad`, if the caller has one and finishes it.
    """
    yield from read_as(_pair, files, source, LAYOUTS, field=field, bad=bad)


def _pair(record: Record) -> Pair:
    """The pair of a row. Raises ValueError; RowFault if one column is at fault."""
    cells = _unwrapped(record.cells)
    unread: set[str] = set()
    sides = [_of_cell(cells[name], name, ASSISTANT, unread) for name in SIDES]
    prompt = _of_cell(cells["prompt"], "prompt", USER, unread, more=cells.get("input")) if "prompt" in cells else None
    prompt, (chosen, rejected) = _parted(prompt, sides)
    _checked("prompt" if "prompt" in cells else "chosen", prompt, 0, is_question=True)
    with _about("history"):
        prompt = [*read_history(cells.get("history")), *prompt]
    with _about("system"):
        prompt = _with_system(prompt, read_system(cells.get("system")))
    with _about("tools"):
        tools = read_tools(cells.get("tools"))
    found: list[Conversation] = []
    for name, answer in zip(SIDES, (chosen, rejected), strict=True):
        messages = [*prompt, *_answer(name, answer)]
        _checked(name, messages, len(prompt))
        learnt = [place >= len(prompt) and each["role"] == ASSISTANT for place, each in enumerate(messages)]
        # What the row has unread counts once.
        keys = frozenset() if found else frozenset(unread)
        found.append(Conversation(record.file, record.line, tuple(messages), tuple(learnt), tools, unread=keys))
    if _is_same(found[0].messages, found[1].messages):
        raise RowFault("rejected", "'chosen' and 'rejected' are the same, so neither is preferred; leave the row out")
    return Pair(*found)


@contextmanager
def _about(column: str) -> Iterator[None]:
    """Says of a ValueError which column it is about, and of a TurnFault which message of it."""
    try:
        yield
    except TurnFault as fault:
        raise RowFault(column, f"message {fault.place + 1} of {column!r}: {fault}") from None
    except ValueError as error:
        raise error if isinstance(error, RowFault) else RowFault(column, str(error)) from None


def _unwrapped(cells: Mapping[str, Any]) -> Mapping[str, Any]:
    """The cells; of a request ({messages, tools}, in CSV as JSON) its messages, and its tools as those of the row."""
    found = dict(cells)
    for name in ("prompt", *SIDES):
        cell = found.get(name)
        if isinstance(cell, str) and cell.lstrip().startswith("{") and '"messages"' in cell:
            with suppress(ValueError, RecursionError):
                cell = json.loads(cell)
        if isinstance(cell, Mapping) and "messages" in cell:
            found[name] = cell["messages"]
            found["tools"] = found.get("tools") or cell.get("tools")
    return found


def _of_cell(cell: Any, name: str, role: str, unread: set[str], *, more: Any = None) -> list[Message]:
    """The messages of a cell: a list of them, one of them, a transcript, or a text, which is one of this role.

    `unread` collects what of messages nothing reads; here a weight is of it.
    """
    with _about(name):
        if isinstance(cell, Mapping) and any(isinstance(cell.get(key), str) for key in _OF_MESSAGES):
            cell = [cell]
        if isinstance(cell, list | tuple) and cell and all(isinstance(each, str) for each in cell):
            if len(cell) > 1:
                raise ValueError(f"{name!r} is a list of {len(cell)} texts; write one, and a row for each other one")
            cell = cell[0]
        if isinstance(cell, list | tuple | Mapping) or _is_written_list(cell):
            values = read_list(cell, name)
            if len(values) > MOST_MESSAGES:
                raise ValueError(f"{name!r} has {len(values):,} messages; at most {MOST_MESSAGES:,}; leave the row out")
            read = read_messages(values)
            unread |= unread_in(read, len(read))
            unread |= {"weights of messages" for each in read if not each.is_learnt}
            return [each.message for each in read]
        if isinstance(cell, str) and _SPEAKER.match(cell) and (said := _transcript(read_text(cell, name))):
            return said
        return [{"role": role, "content": read_question(cell, name, more)}]


def _is_written_list(cell: Any) -> bool:
    """Whether a text is a list of messages, as CSV files have it: as JSON or as Python writes it."""
    begin = cell.lstrip()[:40].replace(" ", "") if isinstance(cell, str) else ""
    return begin.startswith(("[{'", '[{"')) and begin[3:].startswith(_OF_MESSAGES)


def _transcript(text: str) -> list[Message]:
    """The messages of `\\n\\nHuman: …\\n\\nAssistant: …`; an Assistant at its end who says nothing is left out."""
    _, *parts = _SPEAKER.split(text)
    said = [
        {"role": _SPEAKERS[who], "content": what.strip()} for who, what in zip(parts[::2], parts[1::2], strict=True)
    ]
    if said[-1]["role"] == ASSISTANT and not said[-1]["content"]:
        said.pop()
    return said


def _parted(
    prompt: list[Message] | None, sides: Sequence[list[Message]]
) -> tuple[list[Message], Sequence[list[Message]]]:
    """Prompt and answers apart: whole conversations have the prompt within them, as what they begin with alike."""
    are_whole = [side[0]["role"] != ASSISTANT for side in sides]
    if not any(are_whole):
        if prompt is None:
            message = "it has no prompt: there is no column `prompt`, and 'chosen' is an answer alone; map a column"
            raise RowFault("chosen", f"{message} in columns, as prompt: NAME")
        return prompt, sides
    shared = _shared(*sides) if all(are_whole) else _question(sides[are_whole.index(True)])
    if not shared:
        message = "'chosen' and 'rejected' begin with different messages; they must answer the same ones"
        raise RowFault("rejected", message)
    asked = _question(prompt or [])
    if not all(any(_is_same([each], [other]) for other in shared) for each in asked):
        message = "'chosen' and 'rejected' are whole conversations without the 'prompt'; correct it, or leave it out"
        raise RowFault("prompt", message)
    return shared, [side[len(shared) :] if is_whole else side for side, is_whole in zip(sides, are_whole, strict=True)]


def _shared(one: Sequence[Message], other: Sequence[Message]) -> list[Message]:
    """What two conversations begin with alike, up to a message that is to be answered."""
    pairs = takewhile(lambda pair: _is_same([pair[0]], [pair[1]]), zip(one, other, strict=False))
    return _question([message for message, _ in pairs])


def _question(messages: list[Message]) -> list[Message]:
    """A conversation without the answer at its end."""
    end = max((place + 1 for place, each in enumerate(messages) if each["role"] != ASSISTANT), default=0)
    return messages[:end]


def _with_system(prompt: list[Message], text: str) -> list[Message]:
    if not text:
        return prompt
    if prompt[0]["role"] in FIRST_ROLES:
        message = f"message 1 of 'prompt' is a {prompt[0]['role']} message, and the row has a `system` of its own"
        raise RowFault("system", f"{message}; leave one out")
    return [{"role": SYSTEM, "content": text}, *prompt]


def _answer(name: str, answer: list[Message]) -> list[Message]:
    """The messages of an answer up to the last of the assistant."""
    end = max((place + 1 for place, each in enumerate(answer) if each["role"] == ASSISTANT), default=0)
    if not end:
        raise RowFault(name, f"{name!r} has no message of the role assistant, so it answers nothing; leave the row out")
    return answer[:end]


def _checked(name: str, messages: Sequence[Message], num_before: int, *, is_question: bool = False) -> None:
    try:
        check_turns(messages, is_question=is_question)
    except TurnFault as fault:
        raise RowFault(name, f"message {fault.place - num_before + 1} of {name!r}: {fault}") from None


def _is_same(first: Sequence[Message], second: Sequence[Message]) -> bool:
    """Whether messages are the same except for the white space around them."""
    return len(first) == len(second) and all(
        {**one, "content": one["content"].strip()} == {**other, "content": other["content"].strip()}
        for one, other in zip(first, second, strict=True)
    )
