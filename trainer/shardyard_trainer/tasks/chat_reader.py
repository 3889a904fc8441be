"""Reads requests' conversations as prompts: checked as in training, rendered by the model's own template."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Reads conversations for one tokenizer. `fault` says why it cannot: the template is missing or does not work."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        self.fault = "the folder has none"
        if not tokenizer.chat_template:
            return
        try:
            self._template = ChatTemplate(tokenizer.get_chat_template(), tokenizer)
            self.fault = ""
        except (TemplateFault, ValueError) as error:
            self.fault = f"that of the folder does not work: {error}"

    def read(self, instance: model_service_pb2.Instance) -> EncodedPrompt:
        """Encodes a conversation, or a user's text as one. Raises SpecError if the tokenizer fails on it."""
        assert self._template is not None
        try:
            messages = _messages(instance)
        except TurnFault as fault:
            place = f".messages.messages[{fault.place}]" if instance.HasField("messages") else ".text"
            return EncodedPrompt([0], [0], fault=str(fault), field=place)
        try:
            text = self._template.render(messages, prompt=True)
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
