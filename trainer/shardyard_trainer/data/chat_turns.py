"""The rules of conversations: whose turn it is, and what a message may contain; for training and answering."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shardyard_trainer.data.errors import listed, nearest, shorten
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
    **dict.fromkeys(("observation", "function", "tool_response"), TOOL),
}
_CALLERS = ("function_call", "tool_call")
"""Names of an assistant whose message is a call of a tool, as JSON."""

_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""Other keys of a message that a template may read."""

_WEIGHTS = ("weight", "loss_weight", "train")

Message = dict[str, Any]


class TurnFault(ValueError):
    """An error in a conversation; `place` is the number of the message, from 0."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__(message)
        self.place = place


def read_message(place: int, value: Any) -> tuple[Message, bool]:
    """Reads {role, content} or {from, value}: the message as templates read it, and whether an answer is learnt.

    Raises TurnFault.
    """
    if not isinstance(value, Mapping):
        raise TurnFault(place, f"it is {_shown(value)}; write it as {{role, content}}")
    given = {key: each for key, each in value.items() if each is not None}
    speaker = given.get("role", given.get("from"))
    if not isinstance(speaker, str):
        raise TurnFault(place, f"it has the keys {listed(given, most=8)}, but no `role` (or `from`) that is a text")
    role = _OTHER_NAMES.get(speaker.strip().lower(), speaker.strip().lower())
    if role not in ROLES:
        message = f"its role {shorten(speaker)!r} is none of {', '.join(ROLES)}{nearest(role, ROLES)}; correct it"
        raise TurnFault(place, message)
    if speaker.strip().lower() in _CALLERS:
        return {"role": role, "content": "", "tool_calls": _calls(place, given)}, _weight(place, given)
    kept = _kept(place, role, given)
    content = _content(place, given.get("content", given.get("value")), may_lack=bool(kept.get("tool_calls")))
    return {"role": role, "content": content, **kept}, _weight(place, given)


def _kept(place: int, role: str, given: Mapping[str, Any]) -> Message:
    """What templates read besides the content. The one call of the older `function_call` becomes `tool_calls`."""
    kept = {key: given[key] for key in _KEPT if key in given}
    called = given.get("function_call")
    if role == ASSISTANT and called and not kept.get("tool_calls"):
        if not isinstance(called, Mapping):
            raise TurnFault(place, f"its function_call is {_shown(called)}; write it as {{name, arguments}}")
        kept["tool_calls"] = [{"type": "function", "function": called}]
    for key, value in kept.items():
        if fault := unreadable(value):
            raise TurnFault(place, f"its {key} has {fault}")
    return kept


def _calls(place: int, given: Mapping[str, Any]) -> list[Message]:
    """The calls of a message that is one: `{"name": …, "arguments": …}` as JSON, or a list of them."""
    said = _content(place, given.get("content", given.get("value")), may_lack=False)
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        form = '{"name": …, "arguments": {…}}'
        raise TurnFault(
            place, f"it is {_shown(said)}; write what a {given.get('role', given.get('from'))} says as {form}"
        )
    if fault := unreadable(calls):
        raise TurnFault(place, f"its call has {fault}")
    return [{"type": "function", "function": dict(call)} for call in calls]


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
    weight = next((given[name] for name in _WEIGHTS if name in given), 1)
    if weight not in (0, 1):
        raise TurnFault(place, f"its weight is {_shown(weight)}; 1: it is learnt, 0: it is not")
    return bool(weight)


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
