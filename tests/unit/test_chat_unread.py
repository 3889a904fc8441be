"""Whatever a row of a conversation has is read, or a warning of the plan names it with its count."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.chat_folders import chat_folder
from helpers.chats import chat, planned, spec_of, write_lines
from helpers.preferences import spec_of as preference_spec
from helpers.small_specs import locations
from shardyard.v1 import spec_pb2
from shardyard_trainer.data import conversations, preference_rows
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.conversations import read_conversations
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.preference_rows import read_preferences
from shardyard_trainer.data.sources import resolve_source

CALL = {"name": "f", "arguments": {"city": "Paris"}}
CALLED = [{"type": "function", "function": CALL}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TALK = chat("a?", "b")["messages"]
INSTRUCTIONS: Mapping[str, Mapping[str, Any]] = {
    "messages": {"messages": TALK},
    "conversations": {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
    "instruction": {"instruction": "a?", "output": "b"},
    "prompt": {"prompt": "a?", "completion": "b"},
    "text": {"text": "a?"},
}
PREFERENCES: Mapping[str, Mapping[str, Any]] = {
    "prompt": {"prompt": "a?", "chosen": "b", "rejected": "c"},
    "instruction": {"instruction": "a?", "chosen": "b", "rejected": "c"},
    "messages": {"messages": chat("a?")["messages"], "chosen": "b", "rejected": "c"},
    "whole": {"chosen": TALK, "rejected": chat("a?", "c")["messages"]},
    "a chosen conversation": {"messages": TALK, "rejected_response": "c"},
}
BESIDE: Mapping[str, Any] = {
    "system": "Be short.",
    "system_prompt": "Be short.",
    "tools": [TOOL],
    "functions": [TOOL],
    "history": [["x?", "y"]],
    "input": "more",
    "label": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "topic": 7,
}


def read(rows_of: Callable[..., Any], path: Path, **columns: str) -> tuple[list[Any], str]:
    """The rows of a file, and what is said of it to be unread."""
    source = spec_pb2.DataSource(uri=str(path), columns=columns)
    bad = BadRows(source)
    rows = list(rows_of(resolve_source(source, locations(path.parent)), source, field="spec.train_data", bad=bad))
    return rows, bad.unread()


def test_the_tables_have_every_optional_role_of_both_tasks() -> None:
    every = [role for each in (conversations, preference_rows) for layout in each.LAYOUTS for role in layout]
    assert {role.name for role in every if role.is_optional} <= set(BESIDE)


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize(
    "layout", [("instruction", name) for name in INSTRUCTIONS] + [("preference", name) for name in PREFERENCES]
)
def test_a_column_beside_any_layout_is_read_or_named(tmp_path: Path, layout: tuple[str, str], beside: str) -> None:
    task, name = layout
    rows_of = read_conversations if task == "instruction" else read_preferences
    base = (INSTRUCTIONS if task == "instruction" else PREFERENCES)[name]
    (plain,), unread = read(rows_of, write_lines(tmp_path / "a.jsonl", [base]))
    assert not unread
    path = write_lines(tmp_path / "a.jsonl", [{**base, beside: BESIDE[beside]}])
    if (name, beside) == ("whole", "input"):
        # Here it would be the prompt.
        with pytest.raises(DataError, match="prompt"):
            read(rows_of, path)
        return
    (row,), unread = read(rows_of, path)
    # A label of a good answer changes nothing: the row is learnt as it is.
    is_read = row != plain or (beside == "label" and task == "instruction" and name != "text")
    assert is_read != (f"column '{beside}' (1 row)" in unread)


KEYS: Mapping[str, tuple[Any, str]] = {
    "name": ("Ann", "name"),
    "tool_calls": (CALLED, "tool_calls"),
    "function_call": (CALL, "tool_calls"),
    "reasoning_content": ("Hm.", "reasoning_content"),
    "reasoning": ("Hm.", "reasoning_content"),
    "thinking": ("Hm.", "reasoning_content"),
    "metadata": ({"a": 1}, ""),
    "value": ("another content", ""),
}


@pytest.mark.parametrize("rows_of", [read_conversations, read_preferences])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_an_answer_is_kept_for_the_template_or_named(
    tmp_path: Path, rows_of: Callable[..., Any], key: str
) -> None:
    value, kept = KEYS[key]
    answer = {"role": "assistant", "content": "b", key: value, "annotations": [], "audio": None}
    whole = [chat("a?")["messages"][0], answer]
    row = {"messages": whole} if rows_of is read_conversations else {"chosen": whole, "rejected": TALK}
    path = write_lines(tmp_path / "a.jsonl", [row])
    if not kept and rows_of is read_preferences:
        row["rejected"] = chat("a?", "c")["messages"]
        write_lines(path, [row])
    (found,), _ = read(rows_of, path)
    found = found if rows_of is read_conversations else found.chosen
    if kept:
        assert found.messages[1][kept] == (CALLED if kept == "tool_calls" else value)
    assert found.unread == (frozenset() if kept else {f"key '{key}' of messages"})


WEIGHTS = ("weight", "loss_weight", "train", "loss")


@pytest.mark.parametrize("key", WEIGHTS)
def test_an_answer_of_no_weight_is_not_learnt_whatever_the_weight_is_called(tmp_path: Path, key: str) -> None:
    messages = chat("a?", "wrong", "b?", "right")["messages"]
    messages[1][key] = False
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    (row,), unread = read(read_conversations, path)
    assert row.learnt == (False, False, False, True) and not row.unread and not unread
    messages[1]["weight"] = messages[1][key] = 1
    messages[1]["loss"] = 0
    with pytest.raises(DataError, match=r"message 2: its weight and its .* differ; leave one out|its weight and its"):
        read(read_conversations, write_lines(path, [{"messages": messages}]))
    ranked = {"chosen": [messages[0], {"role": "assistant", "content": "x", key: 0}], "rejected": TALK}
    (pair,), _ = read(read_preferences, write_lines(path, [ranked]))
    assert pair.chosen.unread == {"weights of messages"}


def test_thoughts_and_weights_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for keys, said in (
        ({"reasoning": "x", "thinking": "y"}, "its reasoning and its thinking differ"),
        ({"thinking": {"a": 1}}, "its thinking is .*, which is not a text"),
        ({"weight": 1, "loss": 0}, "its weight and its loss differ"),
    ):
        messages = [chat("a?")["messages"][0], {"role": "assistant", "content": "b", **keys}]
        with pytest.raises(DataError, match=f"message 2: {said}"):
            read(read_conversations, write_lines(tmp_path / "a.jsonl", [{"messages": messages}]))


def as_text(key: str, record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, key: json.dumps(record[key])}


ARGUMENTS: Mapping[str, list[Any]] = {
    "an object": [{"role": "assistant", "tool_calls": CALLED}],
    "text, as OpenAI writes it": [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": as_text("arguments", CALL)}]}
    ],
    "an old call": [{"role": "assistant", "content": "", "function_call": as_text("arguments", CALL)}],
    "a message of its own": [{"from": "function_call", "value": json.dumps(as_text("arguments", CALL))}],
    "calls as text": [{"role": "assistant", "tool_calls": json.dumps(CALLED)}],
}


@pytest.mark.parametrize("form", ARGUMENTS)
def test_arguments_are_values_however_a_call_is_written(tmp_path: Path, form: str) -> None:
    messages = [chat("a?")["messages"][0], *ARGUMENTS[form]]
    tools = [{"type": "function", "function": as_text("parameters", TOOL["function"])}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}])
    (row,), _ = read(read_conversations, path)
    assert row.messages[1]["tool_calls"] == CALLED and row.tools == (TOOL,)


@pytest.mark.parametrize("written", ["Paris", "{broken", '{"a": NaN}', "[1]"])
def test_arguments_that_are_no_object_stay_as_they_are(tmp_path: Path, written: str) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": written}}]
    messages = [chat("a?")["messages"][0], {"role": "assistant", "tool_calls": calls}]
    (row,), _ = read(read_conversations, write_lines(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert row.messages[1]["tool_calls"] == calls


def asking(content: str, place: str, tool: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {place: {"type": "string"}}, "required": [place]}
    called = [{"id": "1", "type": "function", "function": {"name": tool, "arguments": {place: content}}}]
    return {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"{content}?"}], "metadata": {"a": [1]}},
            {"role": "assistant", "content": None, "tool_calls": called},
            {"role": "tool", "content": "7", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is 7.", "reasoning": "Seven."},
        ],
        "tools": [{"type": "function", "function": {"name": tool, "parameters": parameters}}],
    }


def test_nested_records_of_parquet_are_read_as_those_of_json(tmp_path: Path) -> None:
    rows = [asking("Paris", "city", "weather"), asking("7", "number", "square")]
    for row in rows:
        for message in row["messages"]:
            # A column of Parquet has one type.
            message["content"] = (
                [{"type": "text", "text": message["content"]}]
                if isinstance(message["content"], str)
                else message["content"]
            )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [
        read(read_conversations, path)[0] for path in (write_lines(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet")
    ]
    for one, other in zip(*found, strict=True):
        assert one.messages == other.messages and one.tools == other.tools
        assert one.unread == other.unread == {"key 'metadata' of messages"}


def test_records_of_parquet_that_no_text_can_be_made_of_say_how_to_save_them(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": b"x"}]}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'messages' is .*; cells are texts, numbers, and lists .* as JSONL"):
        read(read_conversations, tmp_path / "a.parquet")
    deep: Any = "x"
    for _ in range(9):
        deep = {"a": deep}
    pq.write_table(pa.Table.from_pylist([{"messages": [deep]}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="8 levels at most"):
        read(read_conversations, tmp_path / "a.parquet")


@pytest.mark.parametrize("layout", [name for name in INSTRUCTIONS if name != "text"])
@pytest.mark.parametrize("label", [False, 0, "False", "0"])
def test_a_row_whose_label_says_that_its_answer_is_bad_is_not_learnt(tmp_path: Path, layout: str, label: Any) -> None:
    rows = [{**INSTRUCTIONS[layout], "label": True}, {**INSTRUCTIONS[layout], "label": label}]
    with pytest.raises(DataError, match=r"line 2: its label is .*: the answer is a bad one, .*leave such rows out"):
        read(read_conversations, write_lines(tmp_path / "a.jsonl", rows))


def test_messages_of_a_tree_are_no_texts_unless_the_column_is_mapped(tmp_path: Path) -> None:
    row = {"message_id": "2", "parent_id": "1", "text": "A colour.", "role": "assistant"}
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"beside `text` there is 'parent_id' and 'role'.*write a conversation a row"):
        read(read_conversations, path)
    (found,), unread = read(read_conversations, path, text="text")
    assert found.text == "A colour." and "column 'parent_id'" in unread


def test_a_mapped_column_that_the_layout_does_not_read_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK, "earlier": [["x", "y"]]}])
    with pytest.raises(DataError, match="history is not read beside `messages`; leave it out of columns"):
        read(read_conversations, path, history="earlier")


def test_a_plan_names_what_is_not_read_with_its_count(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**chat("a?", "b"), "id": at, "topic": at} for at in range(4)]
    rows[0]["messages"][1]["metadata"] = {"a": 1}
    rows[1]["messages"] += chat("c?")["messages"]
    path = write_lines(tmp_path / "a.jsonl", rows)
    for spec in (spec_of(path), preference_spec(_pairs(tmp_path))):
        folders = {"projects/default/models/chat": chat_folder(tmp_path / "chat")}
        found = planned(tmp_path, spec, **folders)
        assert not found.violations, found.violations
        (told,) = [each.message for each in found.plan.warnings if each.reason == "DATA_NOT_READ"]
        assert "column 'topic' (4 rows)" in told and "'id'" not in told and "key 'metadata' of messages (1 row)" in told
        assert ("messages after the last answer (1 row)" in told) == spec.fine_tuning.HasField("instruction")


def _pairs(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [{**PREFERENCES["whole"], "topic": at} for at in range(4)]
    answer = {"role": "assistant", "content": "b", "metadata": 1}
    rows[0] = {**rows[0], "chosen": [chat("a?")["messages"][0], answer]}
    return write_lines(folder / "b.jsonl", rows)
