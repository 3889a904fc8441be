"""Reads requests' conversations as prompts: checked as in training, rendered by the model's own template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardyard.v1 import model_service_pb2
from shardyard_trainer.data.chat_turns import USER, Message, TurnFault, check_turns, read_message
from shardyard_trainer.inputs.chat_template import ChatTemplate, TemplateFault
from shardyard_trainer.inputs.text import EncodedText
from shardyard_trainer.inputs.tokenization import encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises


@dataclass(frozen=True)
class EncodedPrompt(EncodedText):
    """A prompt as token ids; or `fault`, its error, in the field `field` of the instance."""

    fault: str = ""
    field: str = ""


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
            messages = _messages(instance)
        except TurnFault as fault:
            place = f".messages.messages[{fault.place}]" if instance.HasField("messages") else ".text"
            return EncodedPrompt([0], [0], fault=str(fault), field=place)
        try:
            text = template.render(messages, prompt=True)
        except TemplateFault as fault:
            field = f".{instance.WhichOneof('input')}"
            return EncodedPrompt([0], [0], fault=f"the model's chat template does not take it: {fault}", field=field)
        with encoding_raises(encoding_fault):
            # The template has already written the special tokens.
            ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        ids = ids or [int(self._tokenizer.pad_token_id or 0)]
        return EncodedPrompt(ids, [0] * len(ids))


def _messages(instance: model_service_pb2.Instance) -> list[Message]:
    """Raises TurnFault."""
    if not instance.HasField("messages"):
        found: list[Message] = [{"role": USER, "content": instance.text}]
    else:
        given = enumerate(instance.messages.messages)
        found = [read_message(place, {"role": each.role, "content": each.content})[0] for place, each in given]
    check_turns(found, is_question=True)
    return found
