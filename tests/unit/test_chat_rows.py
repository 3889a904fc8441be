"""Conversations and preferences in the layouts of public data sets and of other trainers, as rows of messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import chat, write_lines
from helpers.small_specs import locations
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.conversations import Conversation, read_conversations
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.preference_rows import read_preferences
from shardyard_trainer.data.sources import resolve_source

TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"name": "add", "arguments": {"a": 1}}


def read(read_rows: Callable[..., Any], folder: Path, *rows: Mapping[str, Any], **columns: str) -> list[Any]:
    source = spec_pb2.DataSource(uri=str(write_lines(folder / "a.jsonl", rows)), columns=columns)
    return list(read_rows(resolve_source(source, locations(folder)), source, field="spec.train_data"))


def said(row: Conversation) -> list[tuple[str, str]]:
    """The messages of a row; the role of a learnt one ends with a star."""
    pairs = zip(row.messages, row.learnt, strict=True)
    return [(each["role"] + "*" * is_learnt, each["content"]) for each, is_learnt in pairs]


PREFERENCES: Mapping[str, Mapping[str, Any]] = {
    "a conversation and its rejected answer": {"messages": chat("a?", "good")["messages"], "rejected_response": "bad"},
    "a conversation and its rejected message": {
        "messages": chat("a?", "good")["messages"],
        "rejected_messages": [{"role": "assistant", "content": "bad"}],
    },
    "two conversations": {
        "messages": chat("a?", "good")["messages"],
        "rejected_messages": chat("a?", "bad")["messages"],
    },
    "messages as the prompt": {
        "messages": chat("a?")["messages"],
        "chosen": {"role": "assistant", "content": "good"},
        "rejected": {"role": "assistant", "content": "bad"},
    },
    "a conversation as the prompt": {"conversation": chat("a?")["messages"], "chosen": "good", "rejected": "bad"},
    "the chosen conversation once more": {
        "messages": chat("a?", "good")["messages"],
        "chosen": chat("a?", "good")["messages"],
        "rejected": chat("a?", "bad")["messages"],
    },
    "a request with two outputs": {
        "input": {"messages": chat("a?")["messages"], "tools": [], "parallel_tool_calls": True},
        "preferred_output": chat("", "good")["messages"][1:],
        "non_preferred_output": chat("", "bad")["messages"][1:],
    },
    "requests as JSON": {
        "chosen": json.dumps({"messages": chat("a?", "good")["messages"], "tools": []}),
        "rejected": json.dumps({"messages": chat("a?", "bad")["messages"]}),
    },
    "an answer in a list": {"prompt": "a?", "chosen": ["good"], "rejected": ["bad"]},
    "a query": {"query": "a?", "chosen_response": "good", "rejected_response": "bad"},
    "one whole conversation": {"prompt": "a?", "chosen": chat("a?", "good")["messages"], "rejected": "bad"},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_pairs_are_read_as_other_trainers_and_public_data_sets_write_them(tmp_path: Path, name: str) -> None:
    (pair,) = read(read_preferences, tmp_path, PREFERENCES[name])
    assert said(pair.chosen) == [("user", "a?"), ("assistant*", "good")]
    assert said(pair.rejected) == [("user", "a?"), ("assistant*", "bad")]
    assert pair.chosen.tools == pair.rejected.tools == ()


def test_a_request_brings_its_tools_and_a_row_its_history(tmp_path: Path) -> None:
    request = {"messages": chat("a?", system="Be short.")["messages"], "tools": TOOLS}
    (pair,) = read(read_preferences, tmp_path, {"prompt": request, "chosen": "good", "rejected": "bad"})
    assert list(pair.chosen.tools) == list(pair.rejected.tools) == TOOLS
    assert said(pair.chosen)[0] == ("system", "Be short.")
    row = {"system": "Be short.", "history": [["x?", "y"]], "prompt": "a?", "chosen": "good", "rejected": "bad"}
    (pair,) = read(read_preferences, tmp_path, row)
    roles = ("system", "user", "assistant", "user", "assistant*")
    assert said(pair.rejected) == list(zip(roles, ("Be short.", "x?", "y", "a?", "bad"), strict=True))


def test_of_one_conversation_with_tools_the_last_answer_alone_is_compared(tmp_path: Path) -> None:
    called = [{"role": "assistant", "tool_calls": [{"function": CALL}]}, {"role": "tool", "content": "3"}]
    messages = [*chat("a?")["messages"], *called, {"role": "assistant", "content": "three"}]
    (pair,) = read(read_preferences, tmp_path, {"messages": messages, "rejected_response": "four"})
    assert said(pair.chosen)[1:] == [("assistant", ""), ("tool", "3"), ("assistant*", "three")]
    assert said(pair.rejected)[1:] == [("assistant", ""), ("tool", "3"), ("assistant*", "four")]


CONVERSATIONS: Mapping[str, tuple[Mapping[str, Any], list[tuple[str, str]]]] = {
    "history beside an instruction": (
        {"instruction": "a?", "input": "", "output": "b", "history": [["x?", "y"]]},
        [("user", "x?"), ("assistant*", "y"), ("user", "a?"), ("assistant*", "b")],
    ),
    "no history": ({"query": "a?", "response": "b", "history": None}, [("user", "a?"), ("assistant*", "b")]),
    "history as JSON": (
        {"system": "s", "query": "a?", "response": "b", "history": '[["x?", "y"]]'},
        [("system", "s"), ("user", "x?"), ("assistant*", "y"), ("user", "a?"), ("assistant*", "b")],
    ),
    "another chatbot": (
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "bing", "value": "b"}]},
        [("user", "a?"), ("assistant*", "b")],
    ),
    "a call as a message": (
        {
            "conversations": [
                {"from": "human", "value": "a?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "b"},
            ],
            "tools": json.dumps(TOOLS),
        },
        [("user", "a?"), ("assistant*", ""), ("tool", "3"), ("assistant*", "b")],
    ),
}


IN_ROWS: Mapping[str, Mapping[str, Any]] = {
    "calls one after another": {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_call", "content": json.dumps(CALL), "thinking": "Both."},
            {"role": "tool_response", "content": "3"},
            {"role": "tool_response", "content": "3"},
            {"role": "assistant", "content": "b"},
        ]
    },
    "a call after what is said": {
        "conversations": [
            {"from": "human", "value": "a?"},
            {"from": "gpt", "value": "Let me see."},
            {"from": "function_call", "value": json.dumps([CALL, CALL]), "reasoning": "Both."},
            {"from": "observation", "value": "3"},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "b"},
        ]
    },
}


@pytest.mark.parametrize("name", IN_ROWS)
def test_calls_in_messages_of_their_own_belong_to_one_answer(tmp_path: Path, name: str) -> None:
    (found,) = read(read_conversations, tmp_path, IN_ROWS[name])
    assert [each["role"] for each in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found.messages[1] == {
        "role": "assistant",
        "content": "Let me see." if "conversations" in IN_ROWS[name] else "",
        "tool_calls": [{"type": "function", "function": CALL}] * 2,
        "reasoning_content": "Both.",
    }
    ((_, turns),) = IN_ROWS[name].items()
    pair = {"prompt": "a?", "chosen": turns[1:], "rejected": "no"}
    (found,) = read(read_preferences, tmp_path, pair)
    assert len(found.chosen.messages[1]["tool_calls"]) == 2


def test_messages_are_counted_as_the_file_has_them_and_a_call_has_the_weight_of_its_answer(tmp_path: Path) -> None:
    turns = [*IN_ROWS["calls one after another"]["messages"][:4], {"role": "user", "content": "x"}]
    with pytest.raises(DataError, match="message 5: its role is user"):
        read(read_conversations, tmp_path, {"messages": turns})
    turns[2] = {**turns[2], "weight": 0}
    with pytest.raises(DataError, match="message 3: its weight is not that of the message before it"):
        read(read_conversations, tmp_path, {"messages": turns})


@pytest.mark.parametrize("blank", ["", " ", None])
def test_an_input_without_an_instruction_is_the_question(tmp_path: Path, blank: str | None) -> None:
    (found,) = read(read_conversations, tmp_path, {"instruction": blank, "input": "a?", "output": "b"})
    assert said(found) == [("user", "a?"), ("assistant*", "b")]
    (pair,) = read(read_preferences, tmp_path, {"instruction": blank, "input": "a?", "chosen": "b", "rejected": "c"})
    assert said(pair.chosen) == [("user", "a?"), ("assistant*", "b")]
    with pytest.raises(DataError, match=r"'instruction' is (blank|missing)"):
        read(read_conversations, tmp_path, {"instruction": blank, "input": " ", "output": "b"})


def test_a_message_says_what_it_lacks_and_a_file_the_column_that_it_lacks(tmp_path: Path) -> None:
    scored = {"prompt": "a?", "chosen": {"content": "b", "score": 2}, "rejected": {"content": "c", "score": 1}}
    with pytest.raises(DataError, match="it has the keys content, score, but no `role`"):
        read(read_preferences, tmp_path, scored)
    with pytest.raises(DataError, match=r"'completion' is '2'; write a text in quotes.*the column 'answer'"):
        read(read_conversations, tmp_path, {"question": "1 + 1", "answer": 2})
    with pytest.raises(DataError, match="map them in columns, as instruction: NAME"):
        read(read_conversations, tmp_path, {"input": "a?", "output": "b"})
    (found,) = read(read_conversations, tmp_path, {"messages": [*chat("a?", "b")["messages"], *CALLED_AS_LLAMA]})
    assert found.messages[-2]["role"] == "tool"


CALLED_AS_LLAMA = [
    {"role": "user", "content": "c?"},
    {"role": "assistant", "tool_calls": [{"function": CALL}]},
    {"role": "ipython", "content": "3"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_read_as_other_trainers_and_public_data_sets_write_them(tmp_path: Path, name: str) -> None:
    row, expected = CONVERSATIONS[name]
    (found,) = read(read_conversations, tmp_path, row)
    assert said(found) == expected
    calls = [call["function"] for message in found.messages for call in message.get("tool_calls", ())]
    assert calls == ([CALL] if "tools" in row else []) and list(found.tools) == (TOOLS if "tools" in row else [])


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]], ids=["list", "text", "texts"])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_are_a_list_or_text_of_json(tmp_path: Path, tools: Any, column: str) -> None:
    (found,) = read(read_conversations, tmp_path, {**chat("a?", "b"), column: tools})
    assert list(found.tools) == TOOLS


@pytest.mark.parametrize("call", ["add 1", "[]", '{"arguments": {}}', '["add"]', '{"name": "\\ud83d"}'])
def test_a_call_that_is_none_is_refused_with_how_to_write_it(tmp_path: Path, call: str) -> None:
    row = {"conversations": [{"from": "human", "value": "a?"}, {"from": "tool_call", "value": call}]}
    with pytest.raises(DataError, match=r"message 2: (it is .*; write what a tool_call says as|its call has half)"):
        read(read_conversations, tmp_path, row)


def test_a_file_without_the_columns_names_each_way_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        read(read_preferences, tmp_path, {"prompt": "a?", "completion": "b", "label": True})
    assert str(refused.value).count("`prompt` and `chosen` and `rejected`") == 1
