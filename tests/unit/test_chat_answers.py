"""Conversations in Predict: asked by the template of the model's folder, answered as plain transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chat_folders import CHATML, chat_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.tasks.opening import open_model

Said = tuple[str, str]


def conversation(*said: Said) -> pb.Instance:
    return pb.Instance(messages=pb.Messages(messages=[pb.ChatMessage(role=role, content=text) for role, text in said]))


def ask(folder: Path, *instances: pb.Instance, new: int = 6) -> worker_pb2.PredictReply:
    request = pb.PredictRequest(model="projects/default/models/m", instances=instances)
    request.generation.max_new_tokens = new
    call = worker_pb2.PredictCall(folder=str(folder), request=request, max_response_bytes=2**20)
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def instructed(folder: Path) -> Path:
    """The folder as one of the task `instruction`."""
    (folder / "shardyard.json").write_text(json.dumps({"format": 1, "task": "instruction", "max_length": 64}))
    return folder


@torch.inference_mode()
def plain_answer(folder: Path, *said: Said) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": role, "content": text} for role, text in said]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def test_a_causal_model_with_a_template_answers_conversations_and_continues_texts(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path)
    assert open_model(open_folder(folder)).predictor.takes == ("text", "messages")
    said: list[Said] = [("system", "Be short."), ("user", "a?"), ("assistant", "b"), ("user", "c?")]
    reply = ask(folder, conversation(*said), pb.Instance(text="a?"), conversation(("user", "a?")))
    found = [each.generated_text for each in reply.response.predictions]
    assert found[0] == plain_answer(folder, *said) and found[2] == plain_answer(folder, ("user", "a?"))
    assert len(found) == 3 and found[1] != found[2]


def test_the_text_for_an_instruction_model_is_the_message_of_a_user(tmp_path: Path) -> None:
    folder = instructed(chat_folder(tmp_path))
    assert open_model(open_folder(folder)).predictor.takes == ("messages", "text")
    reply = ask(folder, pb.Instance(text="a?"), conversation(("user", "a?")))
    first, second = (each.generated_text for each in reply.response.predictions)
    assert first == second == plain_answer(folder, ("user", "a?"))


def test_conversations_out_of_order_are_refused_by_their_messages_all_at_once(tmp_path: Path) -> None:
    reply = ask(
        instructed(chat_folder(tmp_path)),
        conversation(("user", "a?")),
        conversation(("assistant", "a")),
        conversation(("user", "a?"), ("assistant", "b")),
        conversation(("user", " ")),
        conversation(("nobody", "a")),
        pb.Instance(text="\n"),
    )
    assert [(each.field, each.reason) for each in reply.violations] == [
        ("instances[1].messages.messages[0]", "SPEC_INVALID"),
        ("instances[2].messages.messages[1]", "SPEC_INVALID"),
        ("instances[3].messages.messages[0]", "SPEC_INVALID"),
        ("instances[4].messages.messages[0]", "SPEC_INVALID"),
        ("instances[5].text", "SPEC_INVALID"),
    ]
    assert "send a user's last" in reply.violations[1].message and not reply.response.predictions


@pytest.mark.parametrize(
    ("template", "message"), [(None, "the folder has none"), ("{% for", "that of the folder does not work: line 1")]
)
def test_without_a_template_that_works_a_conversation_is_refused_and_a_text_is_not(
    template: str | None, message: str, tmp_path: Path
) -> None:
    folder = chat_folder(tmp_path, template)
    (violation,) = ask(folder, conversation(("user", "a?")), pb.Instance(text="a")).violations
    assert violation.reason == "TASK_MISMATCH" and violation.field == "instances[0].messages"
    assert message in violation.message and "takes `text`" in violation.message
    assert len(ask(folder, pb.Instance(text="a")).response.predictions) == 1
    with pytest.raises(FolderInvalid, match="it needs a chat template"):
        open_model(open_folder(instructed(folder)))


def test_what_the_template_itself_refuses_is_said_of_the_instance(tmp_path: Path) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    folder = chat_folder(tmp_path, no_system + CHATML)
    (violation,) = ask(folder, conversation(("system", "a"), ("user", "b")), conversation(("user", "b"))).violations
    assert violation.field == "instances[0].messages" and "no system here" in violation.message
