"""Conversations in the SDK and on the command line: lists of messages, lines of JSON, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

import shardyard
from shardyard._requests import batches, instance
from shardyard.cli.texts import read_instances

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]


def test_a_list_of_messages_is_one_conversation() -> None:
    made = instance(CHAT, 0)
    assert [(each.role, each.content) for each in made.messages.messages] == [
        (each["role"], each["content"]) for each in CHAT
    ]
    assert instance(tuple(CHAT[:1]), 0).WhichOneof("input") == "messages"


@pytest.mark.parametrize(
    ("item", "field", "message"),
    [
        ([{"role": "user", "content": "a", "mood": "x"}], "instances[2].messages.messages[0]", "leave out mood"),
        ([{"role": "user", "content": [{"type": "image"}]}], "instances[2].messages.messages[0].content[0]", "a text"),
        ([{"role": "a", "tool_calls": "f"}], "instances[2].messages.messages[0].tool_calls", "not a list of calls"),
        ([{"role": "a", "tool_calls": ["f"]}], "instances[2].messages.messages[0].tool_calls[0]", "not an object"),
        (
            [{"role": "a", "tool_calls": [{"type": "custom"}]}],
            "instances[2].messages.messages[0].tool_calls[0].type",
            "only calls of functions",
        ),
        (
            [{"role": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"n": float("nan")}}}]}],
            "instances[2].messages.messages[0].tool_calls[0].arguments",
            "cannot be written as JSON",
        ),
        ({"messages": CHAT, "tools": {"name": "f"}}, "instances[2].messages.tools", "not a list of tools"),
        ({"messages": CHAT, "tools": [{"name": {1}}]}, "instances[2].messages.tools[0]", "cannot be written as JSON"),
        ({"messages": [], "tools": []}, "instances[2]", "nor a list of messages"),
        ([{"role": "user", "content": 5}], "instances[2].messages.messages[0].content", "5"),
        ([CHAT[0], "b"], "instances[2]", "nor a list of messages"),
        ([], "instances[2]", "nor a list of messages"),
        (CHAT[0], "instances[2]", "nor a list of messages"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(item: Any, field: str, message: str) -> None:
    with pytest.raises(shardyard.InvalidArgument) as caught:
        instance(item, 2)
    (violation,) = caught.value.violations
    assert violation.field == field and message in violation.message


def test_tools_and_calls_are_sent_as_other_clients_write_them() -> None:
    function = {"name": "f", "arguments": {"city": "Zürich"}}
    called = {"id": "c1", "type": "function", "index": 0, "function": {**function, "arguments": '{"city": "Zürich"}'}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}], "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [called, function],
            "reasoning_content": "hm",
            "audio": None,
        },
        {"role": "tool", "content": "7", "tool_call_id": "c1", "name": "f"},
    ]
    made = instance({"messages": chat, "tools": [{"name": "f"}, '{"name": "g"}']}, 0).messages
    user, assistant, tool = made.messages
    assert (user.content, assistant.content, assistant.reasoning_content) == ("Hello", "", "hm")
    first, second = assistant.tool_calls
    assert (first.id, first.name, first.arguments) == ("c1", "f", '{"city": "Zürich"}')
    assert (second.id, second.name, second.arguments) == ("", "f", '{"city": "Zürich"}')
    assert (tool.content, tool.tool_call_id, tool.name) == ("7", "c1", "f")
    assert list(made.tools) == ['{"name": "f"}', '{"name": "g"}']
    calls = list(batches([{"messages": chat * 100}] * 60))
    assert [start for start, _ in calls] == [0, 22, 44] and sum(len(made) for _, made in calls) == 60


def test_many_messages_are_sent_in_several_calls() -> None:
    calls = list(batches([CHAT[:1] * 1500] * 40))
    assert [start for start, _ in calls] == [0, 9, 18, 27, 36] and sum(len(made) for _, made in calls) == 40


def test_lines_of_json_are_conversations_for_a_model_that_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('[{"role": "user", "content": "a"}]\n{"messages": [{"role": "user", "content": "b"}]}\nc\n{d\n')
    found = read_instances(("messages", "text"), None, path, pairs=False)
    assert found == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], "c", "{d"]
    asked = {"messages": CHAT, "tools": [{"name": "f"}]}
    (tmp_path / "tools.jsonl").write_text(json.dumps(asked) + "\n")
    assert read_instances(("messages",), None, tmp_path / "tools.jsonl", pairs=False) == [asked]
    assert read_instances(("text", "messages"), None, path, pairs=False)[0].startswith("[{")
    assert read_instances(("messages", "text"), ["[1]"], None, pairs=False) == ["[1]"]
    path.write_text('[{"role": "user", "content": "a"}]\n{"question": "b"}\n')
    with pytest.raises(typer.BadParameter, match="line 2: a conversation is a list of messages"):
        read_instances(("messages",), None, path, pairs=False)


def test_messages_of_the_command_line_are_one_conversation() -> None:
    said = ["system: Be short.", "user: What: this?"]
    assert read_instances(("text", "messages"), None, None, pairs=False, messages=said) == [
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What: this?"}]
    ]
    for wrong in ("Hello", "so what: this"):
        with pytest.raises(typer.BadParameter, match="is not ROLE: TEXT"):
            read_instances(("messages",), None, None, pairs=False, messages=[wrong])
    with pytest.raises(typer.BadParameter, match="leave the texts"):
        read_instances(("messages",), ["a"], None, pairs=False, messages=said)


def test_a_question_nested_without_end_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a", "context": "b"}\n{"question": ' + "[" * 100_000 + "\n")
    with pytest.raises(typer.BadParameter, match="line 2: is not JSON"):
        read_instances(("question",), None, path, pairs=False)
