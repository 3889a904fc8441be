"""Tools in Predict: offered and called as the model's template reads them, as plain transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chat_folders import CHATML, WITH_TOOLS, chat_folder, chat_tokenizer
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.tasks.chat_reader import ChatReader

TOOL = {"type": "function", "function": {"name": "ask", "parameters": {"properties": {"n": {"type": "integer"}}}}}
ASKED = pb.ChatMessage(role="user", content="a?")
CALL = pb.ToolCall(id="c1", name="ask", arguments='{"n": 1, "place": "Zürich"}')
CALLED = pb.ChatMessage(role="assistant", tool_calls=[CALL], reasoning_content="hm")
RESULT = pb.ChatMessage(role="tool", content="7", name="ask", tool_call_id="c1")


def ask(folder: Path, *messages: pb.ChatMessage, tools: tuple[str, ...] = ()) -> worker_pb2.PredictReply:
    asked = pb.Instance(messages=pb.Messages(messages=messages, tools=tools))
    request = pb.PredictRequest(model="projects/default/models/m", instances=[asked])
    request.generation.max_new_tokens = 6
    call = worker_pb2.PredictCall(folder=str(folder), request=request, max_response_bytes=2**20)
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def test_calls_results_thoughts_and_offered_tools_are_written_as_transformers_does() -> None:
    tokenizer = chat_tokenizer(WITH_TOOLS)
    function = {"name": "ask", "arguments": {"n": 1, "place": "Zürich"}}
    calls = [{"id": "c1", "type": "function", "function": function}]
    said: list[dict[str, Any]] = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "content": "7", "name": "ask", "tool_call_id": "c1"},
    ]
    given = pb.Messages(messages=[ASKED, CALLED, RESULT], tools=[json.dumps(TOOL)])
    found = ChatReader(tokenizer).read(pb.Instance(messages=given))
    wanted = tokenizer.apply_chat_template(said, tools=[TOOL], add_generation_prompt=True, return_dict=False)
    assert found.ids == wanted and not found.fault
    text = tokenizer.decode(found.ids)
    assert all(each in text for each in ("(hm)", "c1", "Zürich", "tool ask", '"integer"'))


def test_a_model_answers_the_result_of_a_tool(tmp_path: Path) -> None:
    reply = ask(chat_folder(tmp_path, WITH_TOOLS), ASKED, CALLED, RESULT, tools=(json.dumps(TOOL),))
    assert len(reply.response.predictions) == 1 and not reply.violations


@pytest.mark.parametrize(
    ("messages", "tools", "field", "words"),
    [
        ([ASKED], ["{"], "tools[0]", "is not JSON"),
        ([ASKED], [json.dumps(TOOL), "[" * 60_000], "tools[1]", "is not JSON"),
        ([ASKED], ["[]"], "tools[0]", "is not a JSON object"),
        ([ASKED], ['{"name": "f", "n": 1e999}'], "tools[0]", "too large for a number"),
        ([ASKED], ['{"name": "f", "n": NaN}'], "tools[0]", "NaN is not a JSON number"),
        ([ASKED], ['{"type": "function", "function": {}}'], "tools[0]", "has no function with a name"),
        ([ASKED], ['{"name": "f\\u0000"}'], "tools[0]", "NUL"),
        ([ASKED, "name", RESULT], [], "messages[1].tool_calls[0].name", "does not name its tool"),
        ([ASKED, "arguments", RESULT], [], "messages[1].tool_calls[0].arguments", "is not a JSON object"),
        ([ASKED, RESULT], [], "messages[1]", "its role is tool"),
        ([ASKED, CALLED], [], "messages[1]", "send a user's last"),
        ([pb.ChatMessage(role="user", content="a", tool_calls=[CALL])], [], "messages[0].tool_calls", "assistant"),
        ([pb.ChatMessage(role="user", content="a", reasoning_content="b")], [], "messages[0].reasoning_content", "has"),
    ],
)
def test_what_is_no_tool_and_no_call_is_refused_with_its_place(
    messages: list[Any], tools: list[str], field: str, words: str, tmp_path: Path
) -> None:
    wrong = {"name": pb.ToolCall(id="c1", arguments="{}"), "arguments": pb.ToolCall(name="ask", arguments='["n"]')}
    given = [
        pb.ChatMessage(role="assistant", tool_calls=[wrong[each]]) if isinstance(each, str) else each
        for each in messages
    ]
    (violation,) = ask(chat_folder(tmp_path, WITH_TOOLS), *given, tools=tuple(tools)).violations
    assert violation.field == f"instances[0].messages.{field}" and violation.reason == "SPEC_INVALID"
    assert words in violation.message and len(violation.message) < 400


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [((ASKED,), (json.dumps(TOOL),), "does not read `tools`"), ((ASKED, CALLED, RESULT), (), "not read `tool_calls`")],
)
def test_a_template_that_does_not_read_them_refuses_them(
    messages: tuple[pb.ChatMessage, ...], tools: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    (violation,) = ask(chat_folder(tmp_path, CHATML), *messages, tools=tools).violations
    assert violation.field == "instances[0].messages" and words in violation.message
