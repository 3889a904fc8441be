"""Builds conversations from users' messages and tools, in the form in which OpenAI's API and its clients write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shardyard._messages import build
from shardyard._text import shown
from shardyard.errors import invalid
from shardyard.v1 import model_service_pb2

Chat = Sequence[Mapping[str, Any]]
"""The messages of a conversation, each with `role` and `content`; tools add `tool_calls`, `tool_call_id`, `name`."""

_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
_CALL_KEYS = ("id", "type", "function", "name", "arguments", "index")


def conversation(chat: Chat, tools: Sequence[Any], where: str) -> model_service_pb2.Messages:
    """The messages and tools for the service; keys whose value is None count as left out.

    Raises: InvalidArgument with the place of what is none.
    """
    made = model_service_pb2.Messages()
    for at, message in enumerate(chat):
        made.messages.append(_message(message, f"{where}.messages.messages[{at}]"))
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise invalid(f"{where}.messages.tools", f"{shown(tools)} is not a list of tools, each an object")
    for at, tool in enumerate(tools):
        made.tools.append(_as_json(tool, f"{where}.messages.tools[{at}]"))
    return made


def _message(message: Mapping[str, Any], place: str) -> model_service_pb2.ChatMessage:
    given = _known(message, _KEYS, place, "a message")
    if isinstance(given.get("content"), list | tuple):
        given["content"] = "".join(_part(part, f"{place}.content[{at}]") for at, part in enumerate(given["content"]))
    calls = given.pop("tool_calls", None) or ()
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise invalid(f"{place}.tool_calls", f"{shown(calls)} is not a list of calls, each an object")
    made = build(model_service_pb2.ChatMessage, place, **given)
    made.tool_calls.extend(_call(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(calls))
    return made


def _call(call: Any, place: str) -> model_service_pb2.ToolCall:
    """{id, type, function: {name, arguments}}, or {name, arguments} by itself."""
    given = _known(call, _CALL_KEYS, place, "a call")
    if (kind := given.pop("type", "function")) != "function":
        raise invalid(f"{place}.type", f"{shown(kind)} is given; only calls of functions are read")
    given.pop("index", None)
    if "function" in given:
        given |= _known(given.pop("function"), ("name", "arguments"), f"{place}.function", "a function")
    if not isinstance(given.get("arguments", ""), str):
        given["arguments"] = _as_json(given["arguments"], f"{place}.arguments")
    return build(model_service_pb2.ToolCall, place, **given)


def _known(record: Any, keys: Sequence[str], place: str, what: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise invalid(place, f"{shown(record)} is not an object; {what} has {', '.join(keys)}")
    given = {key: value for key, value in record.items() if value is not None}
    if strange := sorted(str(key) for key in given if key not in keys):
        raise invalid(place, f"{what} has {', '.join(f'`{key}`' for key in keys)}; leave out {', '.join(strange)}")
    return given


def _part(part: Any, place: str) -> str:
    """The text of a part of a message."""
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise invalid(place, f'{shown(part)} is not a text; write it as {{"type": "text", "text": …}}')
    return str(part["text"])


def _as_json(value: Any, place: str) -> str:
    """A value as JSON; text is taken for JSON."""
    if isinstance(value, str):
        return build(model_service_pb2.Instance, place, text=value).text
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(place, f"{shown(value)} cannot be written as JSON: {error}") from None
