"""Reads requests' conversations as prompts: checked as in training, rendered by the model's own template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardyard.v1 import model_service_pb2
from shardyard_trainer.data.chat_turns import ASSISTANT, THOUGHTS, USER, Message, TurnFault, check_turns, read_message
from shardyard_trainer.data.errors import shorten
from shardyard_trainer.data.json_rows import STRICT_JSON
from shardyard_trainer.data.readable import unreadable
from shardyard_trainer.inputs.chat_template import ChatTemplate, TemplateFault
from shardyard_trainer.inputs.text import EncodedText
from shardyard_trainer.inputs.tokenization import encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises


@dataclass(frozen=True)
class EncodedPrompt(EncodedText):
    """A prompt as token ids; or `fault`, its error, in the field `field` of the instance."""

    fault: str = ""
    field: str = ""


class _Fault(ValueError):
    """An error in a conversation; `field` is its place in the instance."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ChatReader:
    """Reads conversations for one tokenizer, whose template is looked at once there is a conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def fault(self) -> str:
        """Why it cannot read any: there is no template, or it does not work; empty: it can."""
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[ChatTemplate | None, str]:
        if not self._tokenizer.chat_template:
            return None, "the folder has none"
        try:
            return ChatTemplate(self._tokenizer.get_chat_template(), self._tokenizer), ""
        except (TemplateFault, ValueError) as error:
            return None, f"that of the folder does not work: {error}"

    def read(self, instance: model_service_pb2.Instance) -> EncodedPrompt:
        """Encodes a conversation, or a user's text as one. Raises SpecError if the tokenizer fails on it."""
        template = self._found[0]
        assert template is not None
        try:
            messages, tools = _messages(instance), _tools(instance)
        except _Fault as fault:
            return EncodedPrompt([0], [0], fault=str(fault), field=fault.field)
        try:
            text = template.render(messages, tools, prompt=True)
        except TemplateFault as fault:
            field = f".{instance.WhichOneof('input')}"
            return EncodedPrompt([0], [0], fault=f"the model's chat template does not take it: {fault}", field=field)
        with encoding_raises(encoding_fault):
            # The template has already written the special tokens.
            ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        ids = ids or [int(self._tokenizer.pad_token_id or 0)]
        return EncodedPrompt(ids, [0] * len(ids))


def _messages(instance: model_service_pb2.Instance) -> list[Message]:
    """Raises _Fault."""
    try:
        if not instance.HasField("messages"):
            found: list[Message] = [{"role": USER, "content": instance.text}]
        else:
            given = enumerate(instance.messages.messages)
            found = [read_message(place, _as_record(place, each)).message for place, each in given]
        check_turns(found, is_question=True)
    except TurnFault as fault:
        place = _place(fault.place) if instance.HasField("messages") else ".text"
        raise _Fault(place, str(fault)) from None
    return found


def _as_record(place: int, message: model_service_pb2.ChatMessage) -> Message:
    """A message as rows of training have it. Raises _Fault."""
    more = {"name": message.name, "tool_call_id": message.tool_call_id, THOUGHTS[0]: message.reasoning_content}
    record: Message = {"role": message.role, "content": message.content}
    record |= {key: value for key, value in more.items() if value}
    if message.tool_calls:
        calls = enumerate(message.tool_calls)
        record["tool_calls"] = [_call(f"{_place(place)}.tool_calls[{at}]", call) for at, call in calls]
    by_role = ((ASSISTANT, "tool_calls"), (ASSISTANT, THOUGHTS[0]))
    if wrong := next((key for role, key in by_role if key in record and role != message.role.strip().lower()), ""):
        raise _Fault(f"{_place(place)}.{wrong}", f"only an assistant's message has {wrong}; leave it out")
    return record


def _call(place: str, call: model_service_pb2.ToolCall) -> Message:
    if not call.name.strip():
        raise _Fault(f"{place}.name", "the call does not name its tool; name it")
    function = {"name": call.name, "arguments": _read_object(f"{place}.arguments", call.arguments or "{}")}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}


def _tools(instance: model_service_pb2.Instance) -> tuple[Any, ...]:
    """The offered tools, as templates read them. Raises _Fault."""
    found = []
    for at, written in enumerate(instance.messages.tools):
        place = f".messages.tools[{at}]"
        tool = _read_object(place, written)
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": …, "description": …, "parameters": …}}'
            raise _Fault(place, f"{shorten(written)!r} has no function with a name; write {form}")
        found.append(tool)
    return tuple(found)


def _read_object(place: str, written: str) -> dict[str, Any]:
    """Raises _Fault."""
    try:
        found = STRICT_JSON.decode(written)
    except (ValueError, RecursionError) as error:
        raise _Fault(place, f"{shorten(written)!r} is not JSON ({shorten(str(error))}); write an object") from None
    if not isinstance(found, dict):
        raise _Fault(place, f"{shorten(written)!r} is not a JSON object; write one, such as {{}}")
    if fault := unreadable(found):
        raise _Fault(place, f"it has {fault}")
    return found


def _place(message: int) -> str:
    return f".messages.messages[{message}]"
