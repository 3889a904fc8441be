"""Preferences in the layouts people use: a prompt with the answer that is chosen and the one that is rejected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
    read_message,
)
from shardyard_trainer.data.conversations import (
    MOST_MESSAGES,
    Conversation,
    read_list,
    read_system,
    read_text,
    read_tools,
)
from shardyard_trainer.data.records import Record, Role, RowFault, read_as
from shardyard_trainer.data.sources import DataFile

SIDES = ("chosen", "rejected")
_SIDES = (
    Role("chosen", ("chosen_response", "response_chosen")),
    Role("rejected", ("rejected_response", "response_rejected")),
)
_BESIDE = (Role("system", ("system_prompt",), is_optional=True), Role("tools", is_optional=True))
LAYOUTS = (
    (
        Role("prompt", ("question", "instruction", "conversations")),
        *_SIDES,
        Role("input", ("context",), is_optional=True),
        *_BESIDE,
    ),
    (Role("prompt", ("input",)), *_SIDES, *_BESIDE),
    (*_SIDES, *_BESIDE),
)
ROLES = tuple(dict.fromkeys(role.name for layout in LAYOUTS for role in layout))

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
    cells = record.cells
    sides = [_of_cell(cells[name], name, ASSISTANT) for name in SIDES]
    prompt = _of_cell(cells["prompt"], "prompt", USER, more=cells.get("input")) if "prompt" in cells else None
    prompt, (chosen, rejected) = _parted(prompt, sides)
    _checked("prompt" if "prompt" in cells else "chosen", prompt, 0, is_question=True)
    prompt = _with_system(prompt, cells.get("system"))
    tools = _tools(cells.get("tools"))
    found = []
    for name, answer in zip(SIDES, (chosen, rejected), strict=True):
        messages = [*prompt, *_answer(name, answer)]
        _checked(name, messages, len(prompt))
        learnt = [place >= len(prompt) and each["role"] == ASSISTANT for place, each in enumerate(messages)]
        found.append(Conversation(record.file, record.line, tuple(messages), tuple(learnt), tools))
    if _is_same(found[0].messages, found[1].messages):
        raise RowFault("rejected", "'chosen' and 'rejected' are the same, so neither is preferred; leave the row out")
    return Pair(*found)


def _of_cell(cell: Any, name: str, role: str, *, more: Any = None) -> list[Message]:
    """The messages of a cell: a list of them, one of them, a transcript, or a text, which is one of this role."""
    try:
        if isinstance(cell, Mapping) and ("role" in cell or "from" in cell):
            cell = [cell]
        if isinstance(cell, list | tuple | Mapping) or _is_written_list(cell):
            values = read_list(cell, name)
            if len(values) > MOST_MESSAGES:
                raise ValueError(f"{name!r} has {len(values):,} messages; at most {MOST_MESSAGES:,}; leave the row out")
            return [read_message(place, value)[0] for place, value in enumerate(values)]
        text = read_text(cell, name)
        if _SPEAKER.match(text) and (said := _transcript(text)):
            return said
        if more is not None and str(more).strip():
            text = f"{text}\n\n{read_text(more, 'input')}"
        return [{"role": role, "content": text}]
    except TurnFault as fault:
        raise RowFault(name, f"message {fault.place + 1} of {name!r}: {fault}") from None
    except ValueError as error:
        raise RowFault(name, str(error)) from None


def _is_written_list(cell: Any) -> bool:
    """Whether a text is a list of messages, as CSV files have it: as JSON or as Python writes it."""
    begin = cell.lstrip()[:40].replace(" ", "") if isinstance(cell, str) else ""
    return begin.startswith(("[{'", '[{"')) and begin[3:].startswith(("role", "from", "content", "value"))


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
    if not all(are_whole):
        name = SIDES[are_whole.index(True)]
        message = f"{name!r} is a whole conversation, and the other one an answer alone; write both alike"
        raise RowFault(name, message)
    shared: list[Message] = []
    for one, other in zip(*sides, strict=False):
        if not _is_same([one], [other]):
            break
        shared.append(one)
    while shared and shared[-1]["role"] == ASSISTANT:
        shared.pop()
    if not shared:
        message = "'chosen' and 'rejected' begin with different messages; they must answer the same ones"
        raise RowFault("rejected", message)
    if prompt is not None and not all(any(_is_same([each], [other]) for other in shared) for each in prompt):
        message = "'chosen' and 'rejected' are whole conversations without the 'prompt'; correct it, or leave it out"
        raise RowFault("prompt", message)
    return shared, [side[len(shared) :] for side in sides]


def _with_system(prompt: list[Message], cell: Any) -> list[Message]:
    text = _said(cell)
    if not text:
        return prompt
    if prompt[0]["role"] in FIRST_ROLES:
        message = f"message 1 of 'prompt' is a {prompt[0]['role']} message, and the row has a `system` of its own"
        raise RowFault("system", f"{message}; leave one out")
    return [{"role": SYSTEM, "content": text}, *prompt]


def _said(cell: Any) -> str:
    try:
        return read_system(cell)
    except ValueError as error:
        raise RowFault("system", str(error)) from None


def _tools(cell: Any) -> tuple[Any, ...]:
    try:
        return read_tools(cell)
    except ValueError as error:
        raise RowFault("tools", str(error)) from None


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
