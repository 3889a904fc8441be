"""The rules of conversations: whose turn it is, and what a message may contain; for training and answering."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from shardyard_trainer.data.errors import listed, nearest, shorten
from shardyard_trainer.data.json_rows import STRICT_JSON
from shardyard_trainer.data.readable import unreadable

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
FIRST_ROLES = (SYSTEM, "developer")
"""The roles of the one message that may come before the first user's."""

ROLES = (*FIRST_ROLES, USER, ASSISTANT, TOOL)

_MAY_FOLLOW: Mapping[str, tuple[str, ...]] = {
    "": (*FIRST_ROLES, USER),
    **dict.fromkeys(FIRST_ROLES, (USER,)),
    USER: (ASSISTANT,),
    ASSISTANT: (USER, TOOL),
    TOOL: (ASSISTANT, TOOL),
}

# Names of the speakers in ShareGPT and other data sets.
_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("human", "prompter", "instruction"), USER),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "function_call", "tool_call"), ASSISTANT),
    **dict.fromkeys(("observation", "function", "tool_response", "ipython"), TOOL),
}
_CALLERS = ("function_call", "tool_call")
"""Names of an assistant whose message is a call of a tool, as JSON."""

_KEPT = ("name", "tool_calls", "tool_call_id")
"""Other keys of a message that a template may read."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of what an assistant thinks before it answers. The first is the one of a message that has been read."""

_WEIGHTS = ("weight", "loss_weight", "train", "loss")
_BLANK: tuple[Any, ...] = (None, "", [], {})

Message = dict[str, Any]


class Read(NamedTuple):
    """A message as templates read it, whether it is learnt if it is an answer, and the keys that nothing reads."""

    message: Message
    is_learnt: bool
    unread: tuple[str, ...]
    place: int
    """Its number in the row, from 0."""
    is_call: bool = False
    """Whether it is a call of a tool as a message of its own."""


class TurnFault(ValueError):
    """An error in a conversation; `place` is the number of the message, from 0."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__(message)
        self.place = place


def read_messages(values: Sequence[Any]) -> list[Read]:
    """Reads the messages of a row. A call in a message of its own belongs to the assistant's message before it.

    Raises TurnFault.
    """
    found: list[Read] = []
    for place, value in enumerate(values):
        read = read_message(place, value)
        if read.is_call and found and found[-1].message["role"] == ASSISTANT:
            found[-1] = _joined(found[-1], read)
        else:
            found.append(read)
    return found


def _joined(said: Read, call: Read) -> Read:
    if said.is_learnt != call.is_learnt:
        rule = "its weight is not that of the message before it, to which the call belongs; give both the same"
        raise TurnFault(call.place, rule)
    both = said.message, call.message
    message: Message = {**said.message, "tool_calls": [each for part in both for each in part.get("tool_calls", ())]}
    if thoughts := [part[THOUGHTS[0]] for part in both if THOUGHTS[0] in part]:
        message[THOUGHTS[0]] = "\n".join(thoughts)
    return said._replace(message=message, unread=(*said.unread, *call.unread))


def unread_in(read: Sequence[Read], num_kept: int) -> set[str]:
    """What of messages nothing reads, if only the first `num_kept` of them are kept."""
    keys = {f"key {shorten(key)!r} of messages" for each in read for key in each.unread}
    return keys | ({"messages after the last answer"} if num_kept < len(read) else set())


def read_message(place: int, value: Any) -> Read:
    """Reads {role, content} or {from, value}. Raises TurnFault."""
    if not isinstance(value, Mapping):
        raise TurnFault(place, f"it is {_shown(value)}; write it as {{role, content}}")
    given = {key: each for key, each in value.items() if each is not None}
    named, says = "role" if "role" in given else "from", "content" if "content" in given else "value"
    speaker = given.get(named)
    if not isinstance(speaker, str):
        raise TurnFault(place, f"it has the keys {listed(given, most=8)}, but no `role` (or `from`) that is a text")
    role = _OTHER_NAMES.get(speaker.strip().lower(), speaker.strip().lower())
    if role not in ROLES:
        message = f"its role {shorten(speaker)!r} is none of {', '.join(ROLES)}{nearest(role, ROLES)}; correct it"
        raise TurnFault(place, message)
    is_call, thoughts = speaker.strip().lower() in _CALLERS, {}
    known = {named, says, *_WEIGHTS}
    if role == ASSISTANT:
        thoughts, known = _thoughts(place, given), {*known, *THOUGHTS}
    if is_call:
        made = {"content": "", "tool_calls": _calls(place, _content(place, given.get(says), may_lack=False), speaker)}
    else:
        known |= {*_KEPT, *(("function_call",) if role == ASSISTANT else ())}
        kept = _kept(place, role, given)
        made = {"content": _content(place, given.get(says), may_lack=bool(kept.get("tool_calls"))), **kept}
    unread = tuple(str(key) for key, each in given.items() if key not in known and each not in _BLANK)
    return Read({"role": role, **made, **thoughts}, _weight(place, given), unread, place, is_call)


def _thoughts(place: int, given: Mapping[str, Any]) -> Message:
    """What an assistant thinks, by its one name; data sets and servers have several for it."""
    found = {key: given[key] for key in THOUGHTS if key in given and given[key] not in _BLANK}
    for key, each in found.items():
        if not isinstance(each, str):
            raise TurnFault(
                place, f"its {key} is {_shown(each)}, which is not a text; write it as one, or leave it out"
            )
        if fault := unreadable(each):
            raise TurnFault(place, f"its {key} has {fault}")
    if len(set(found.values())) > 1:
        raise TurnFault(place, f"its {' and its '.join(found)} differ; leave one out")
    return {THOUGHTS[0]: next(iter(found.values()))} if found else {}


def _kept(place: int, role: str, given: Mapping[str, Any]) -> Message:
    """What templates read besides the content. The one call of the older `function_call` becomes `tool_calls`."""
    kept = {key: given[key] for key in _KEPT if key in given}
    called = given.get("function_call")
    if role == ASSISTANT and called and not kept.get("tool_calls"):
        if not isinstance(called, Mapping):
            raise TurnFault(place, f"its function_call is {_shown(called)}; write it as {{name, arguments}}")
        kept["tool_calls"] = [{"type": "function", "function": called}]
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = _read_calls(place, calls)
    for key, value in kept.items():
        if fault := unreadable(value):
            raise TurnFault(place, f"its {key} has {fault}")
    return kept


def _read_calls(place: int, cell: Any) -> list[Message]:
    """The calls of a message; the list may be text, as JSON, and so may the arguments of each."""
    found = cell
    if isinstance(cell, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(cell)
    if not isinstance(found, list | tuple) or not all(isinstance(call, Mapping) for call in found):
        raise TurnFault(place, f"its tool_calls is {_shown(cell)}; write a list of calls, each an object")
    return [
        {**with_values(call, "arguments"), "function": with_values(called, "arguments")}
        if isinstance(called := call.get("function"), Mapping)
        else with_values(call, "arguments")
        for call in found
    ]


def with_values(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A record in which an object that is written as JSON at `key` is read: templates write it as JSON themselves."""
    written = record.get(key)
    if not isinstance(written, str) or not written.lstrip().startswith("{"):
        return dict(record)
    try:
        found = STRICT_JSON.decode(written)
    except (ValueError, RecursionError):
        found = None
    return {**record, key: found} if isinstance(found, dict) else dict(record)


def _calls(place: int, said: str, speaker: str) -> list[Message]:
    """The calls of a message that is one: `{"name": …, "arguments": …}` as JSON, or a list of them."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        form = '{"name": …, "arguments": {…}}'
        raise TurnFault(place, f"it is {_shown(said)}; write what a {shorten(speaker)} says as {form}")
    read = [{"type": "function", "function": with_values(call, "arguments")} for call in calls]
    if fault := unreadable(read):
        raise TurnFault(place, f"its call has {fault}")
    return read


def _content(place: int, value: Any, *, may_lack: bool) -> str:
    """The text of a message; the parts of a message in parts are joined."""
    if isinstance(value, list):
        return "".join(_part(place, part) for part in value)
    if value is None and may_lack:
        return ""
    if not isinstance(value, str):
        what = "no `content` (or `value`)" if value is None else f"the content {_shown(value)}, which is not a text"
        raise TurnFault(place, f"it has {what}")
    if fault := unreadable(value):
        raise TurnFault(place, f"its content has {fault}")
    return value


def _part(place: int, part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else ""
    if kind != "text":
        what = f"a part of the type {shorten(str(kind))!r}" if kind else f"the part {_shown(part)}"
        raise TurnFault(place, f"its content has {what}; only texts are learnt: {{type: text, text: …}}")
    return _content(place, part.get("text", part.get("value")), may_lack=False)


def _weight(place: int, given: Mapping[str, Any]) -> bool:
    weights = {name: given[name] for name in _WEIGHTS if name in given}
    for name, weight in weights.items():
        if weight not in (0, 1):
            raise TurnFault(place, f"its {name} is {_shown(weight)}; 1: it is learnt, 0: it is not")
    found = {bool(weight) for weight in weights.values()}
    if len(found) > 1:
        raise TurnFault(place, f"its {' and its '.join(weights)} differ; leave one out")
    return found.pop() if found else True


def check_turns(messages: Sequence[Message], *, is_question: bool) -> None:
    """Raises TurnFault for speakers out of order, and for empty messages.

    `is_question`: the conversation is to be answered, so that an assistant's message is not its last.
    """
    before = ""
    for place, message in enumerate(messages):
        role = message["role"]
        allowed = _MAY_FOLLOW[before]
        if role not in allowed:
            where = f"after one of the role {before}" if before else "at the beginning"
            rule = f"but {where} comes {' or '.join(allowed)}; put the messages in order"
            raise TurnFault(place, f"its role is {role}, {rule}")
        calls = role == ASSISTANT and message.get("tool_calls")
        if not message["content"].strip() and role not in (*FIRST_ROLES, TOOL) and not calls:
            raise TurnFault(place, f"the {role}'s message is empty; leave the conversation out, or write what was said")
        before = role
    if is_question and before not in (USER, TOOL):
        what = f"it is of the role {before}" if before else "there is none"
        raise TurnFault(
            max(len(messages) - 1, 0), f"the last message is to be answered, but {what}; send a user's last"
        )


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(shorten(str(value)))
