"""Conversations in the layouts people use: messages, ShareGPT, Alpaca, prompts with completions, plain texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    with_values,
)
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.data.records import Record, Role, RowFault, read_as
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.written_lists import as_list, shown

HISTORY = Role("history", is_optional=True)
BESIDE = (Role("system", ("system_prompt",), is_optional=True), Role("tools", ("functions",), is_optional=True))
"""Roles that every conversation may have."""

_JUDGED = (*BESIDE, Role("label", ("kto_tag",), is_optional=True))
LAYOUTS = (
    (Role("messages"), *_JUDGED),
    (Role("conversations", ("conversation",)), *_JUDGED),
    (
        Role("instruction"),
        Role("input", ("context",), is_optional=True),
        Role("output", ("response",)),
        HISTORY,
        *_JUDGED,
    ),
    (Role("prompt", ("question", "query")), Role("completion", ("response", "answer")), HISTORY, *_JUDGED),
    (Role("text"),),
)
ROLES = tuple(dict.fromkeys(role.name for layout in LAYOUTS for role in layout))
MOST_MESSAGES = 4096
_OF_TREES = ("role", "parent_id")
"""Columns of data sets that have one message a row."""


@dataclass(frozen=True)
class Conversation:
    """A row. `learnt` marks the messages that are answers to learn; of a plain `text`, everything is learnt."""

    file: str
    line: int
    messages: tuple[Message, ...]
    learnt: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    text: str = ""
    unread: frozenset[str] = frozenset()
    """What of its messages nothing reads."""


def read_conversations(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    *,
    field: str,
    last_only: bool = False,
    bad: BadRows | None = None,
) -> Iterator[Conversation]:
    """Yields the conversations of all files, each with an answer to learn. Raises DataError.

    Those that cannot be used go to `bad`, if the caller has one and finishes it. `last_only`: of each conversation only
    the last answer is learnt.
    """
    make = partial(_conversation, last_only=last_only, is_mapped="text" in source.columns)
    yield from read_as(make, files, source, LAYOUTS, field=field, bad=bad, only_one=True)


def _conversation(record: Record, *, last_only: bool, is_mapped: bool) -> Conversation:
    """The conversation of a row. Raises ValueError, also if nothing of it is to be learnt."""
    cells = record.cells
    read = next(read for role, read in _READERS.items() if role in cells)
    if read is None:
        if not is_mapped:
            _check_alone(record.unread)
        return Conversation(record.file, record.line, (), (), text=read_text(cells["text"], "text"))
    _check_judged(cells.get("label"))
    try:
        messages, learnt, unread = _checked(read(cells), cells.get("system"))
    except TurnFault as fault:
        raise ValueError(f"message {fault.place + 1}: {fault}") from None
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError("no message is of the role assistant, so there is nothing to learn; leave the row out")
    if last_only:
        last = max(place for place, message in enumerate(messages) if message["role"] == ASSISTANT)
        learnt = [is_learnt and place == last for place, is_learnt in enumerate(learnt)]
    if not any(learnt):
        which = "the last answer has" if last_only else "all answers have"
        raise ValueError(f"{which} the weight 0, so there is nothing to learn; leave the row out")
    tools = read_tools(cells.get("tools"))
    return Conversation(record.file, record.line, tuple(messages), tuple(learnt), tools, unread=unread)


def _check_alone(others: Sequence[str]) -> None:
    """Raises ValueError for a text beside columns which say that it is a message of a conversation."""
    if said := [name for name in others if name.casefold() in _OF_TREES]:
        raise ValueError(
            f"beside `text` there is {' and '.join(map(repr, said))}, so a row is one message, and not a whole text; "
            "write a conversation a row, as `messages`, or map the column if each is learnt by itself (text: text)"
        )


def _check_judged(label: Any) -> None:
    """Raises ValueError for a row whose label says that its answer is a bad one."""
    written = label.strip().casefold() if isinstance(label, str) else label
    if written in (0, "0", "false"):
        raise RowFault(
            "label",
            f"its label is {shown(label)}: the answer is a bad one, which is not to be learnt; leave such rows out, or "
            "rename the column if it means something else",
        )


def _checked(values: Sequence[Any], system: Any) -> tuple[list[Message], list[bool], frozenset[str]]:
    """Messages up to the last answer, whether each is learnt, and what is not read. Raises TurnFault, ValueError."""
    if len(values) > MOST_MESSAGES:
        raise ValueError(f"{len(values):,} messages; at most {MOST_MESSAGES:,}; break the conversation into several")
    read = read_messages(values)
    messages, learnt = [each.message for each in read], [each.is_learnt for each in read]
    try:
        check_turns(messages, is_question=False)
    except TurnFault as fault:
        raise TurnFault(read[fault.place].place, str(fault)) from None
    answers = [message["role"] == ASSISTANT for message in messages]
    end = max((place + 1 for place, is_answer in enumerate(answers) if is_answer), default=0)
    learnt = [both and answer for both, answer in zip(learnt, answers, strict=True)][:end]
    messages = messages[:end]
    if text := read_system(system):
        if messages and (role := messages[0]["role"]) in FIRST_ROLES:
            raise TurnFault(0, f"it is a {role} message, and the row has a `system` of its own; leave one out")
        messages, learnt = [{"role": SYSTEM, "content": text}, *messages], [False, *learnt]
    return messages, learnt, frozenset(unread_in(read, end))


def read_system(cell: Any) -> str:
    """A row's system message; empty if it has none, or a blank one. Raises ValueError."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return ""
    if not isinstance(cell, str):
        raise RowFault(
            "system", f"'system' is {shown(cell)}, which is not a text; write a text in quotes, or leave it out"
        )
    check_readable(cell, "system")
    return cell


def _of_messages(cells: Mapping[str, Any]) -> list[Any]:
    cell = cells["messages"] if "messages" in cells else cells["conversations"]
    return read_list(cell, "messages" if "messages" in cells else "conversations")


def _of_instruction(cells: Mapping[str, Any]) -> list[Any]:
    asked = read_question(cells["instruction"], "instruction", cells.get("input"))
    answer = {"role": ASSISTANT, "content": read_text(cells["output"], "output")}
    return [*read_history(cells.get("history")), {"role": USER, "content": asked}, answer]


def _of_prompt(cells: Mapping[str, Any]) -> list[Any]:
    return [
        *read_history(cells.get("history")),
        *_messages_or_text(cells["prompt"], USER, "prompt"),
        *_messages_or_text(cells["completion"], ASSISTANT, "completion"),
    ]


def _messages_or_text(cell: Any, role: str, name: str) -> list[Any]:
    """A list of messages; a text becomes one message of this role."""
    if isinstance(cell, list | tuple):
        return read_list(cell, name)
    return [{"role": role, "content": read_text(cell, name)}]


_READERS: Mapping[str, Callable[[Mapping[str, Any]], list[Any]] | None] = {
    "messages": _of_messages,
    "conversations": _of_messages,
    "instruction": _of_instruction,
    "prompt": _of_prompt,
    "text": None,
}


def read_text(cell: Any, name: str) -> str:
    """A text of the column `name`. Raises ValueError for a blank cell, or one that is not a text."""
    if not isinstance(cell, str) or not cell.strip():
        what = "blank" if isinstance(cell, str) else shown(cell)
        form = "a text" if cell is None or isinstance(cell, str) else "a text in quotes"
        raise RowFault(name, f"{name!r} is {what}; write {form}, or leave the row out")
    check_readable(cell, name)
    return cell


def read_question(cell: Any, name: str, more: Any) -> str:
    """A question, with the input `more` below it; the input alone is one if the other is blank. Raises ValueError."""
    if more is None or not str(more).strip():
        return read_text(cell, name)
    added = read_text(more, "input")
    return added if cell is None or cell == "" or str(cell).isspace() else f"{read_text(cell, name)}\n\n{added}"


def read_history(cell: Any) -> list[Message]:
    """The earlier turns of a row, each a question and its answer; none for a blank cell. Raises ValueError."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    found: list[Message] = []
    for turn in as_list(cell, "'history'"):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowFault("history", f"'history' has {shown(turn)}; write a list of [question, answer]")
        found += [
            {"role": role, "content": read_text(said, "history")}
            for role, said in zip((USER, ASSISTANT), turn, strict=True)
        ]
    return found


def check_readable(cell: Any, name: str) -> None:
    """Raises ValueError for a cell with a text that cannot be read."""
    if fault := unreadable(cell):
        raise RowFault(name, f"{name!r} has {fault}")


def read_list(cell: Any, name: str) -> list[Any]:
    """A list, or text that contains one (in CSV), as JSON or as Python writes it. Raises ValueError."""
    if cell is None or (isinstance(cell, str) and not cell.lstrip().startswith("[")):
        raise RowFault(
            name, f"{name!r} is {shown(cell)}; write a list of messages, in CSV as JSON, or leave the row out"
        )
    found = as_list(_by_rows(cell), repr(name))
    if not found:
        raise RowFault(name, f"{name!r} is an empty list; leave the row out")
    return found


def _by_rows(cell: Any) -> Any:
    """The records of a record of lists as long as one another, as the library datasets writes them; else the cell."""
    if not isinstance(cell, Mapping) or not cell or not all(isinstance(column, list) for column in cell.values()):
        return cell
    if len({len(column) for column in cell.values()}) > 1:
        return cell
    return [dict(zip(cell, row, strict=True)) for row in zip(*cell.values(), strict=True)]


def read_tools(cell: Any) -> tuple[Any, ...]:
    """The offered tools: a list, or text that contains one as JSON; so may each tool be. Raises ValueError."""
    if cell is None or cell == "":
        return ()
    found = _parsed(cell, "tools")
    tools = [_parsed(tool, "tools") for tool in found] if isinstance(found, list) else [found]
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault("tools", f"'tools' is {shown(cell)}; write a list of tools, each an object")
    read = [_tool(tool) for tool in tools]
    check_readable(read, "tools")
    return tuple(read)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates read it. In Parquet each has the keys of all others, so one without a value is none."""
    given = with_values({key: each for key, each in tool.items() if each is not None}, "parameters")
    if isinstance(function := given.get("function"), Mapping):
        given["function"] = with_values(function, "parameters")
    return given


def _parsed(cell: Any, name: str) -> Any:
    """A cell, or the value of its JSON. Raises ValueError."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise RowFault(name, f"{name!r} is {shown(cell)}; write a list of tools as JSON") from None
