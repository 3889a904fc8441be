"""Conversations as people write them, and which of their tokens are learnt; what is refused is named by its row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.chat_folders import CHATML, MARKED, chat_folder
from helpers.chats import chat, planned, spec_of, write_lines
from helpers.small_specs import locations
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

PAIRS = [("What is red?", "A rose."), ("What is blue?", "The sky, mostly.")] * 4


def messages(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl", [chat(*pair) for pair in PAIRS])


def one_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([chat(*pair) for pair in PAIRS]))
    return folder / "a.json"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"messages": [chat(*pair)["messages"] for pair in PAIRS]}), folder / "a.parquet")
    return folder / "a.parquet"


def as_csv(folder: Path) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "messages"])
        rows.writerows([(at, json.dumps(chat(*pair)["messages"])) for at, pair in enumerate(PAIRS)])
    return folder / "a.csv"


def share_gpt(folder: Path) -> Path:
    rows = [
        {"id": "x", "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]}
        for ask, answer in PAIRS
    ]
    return write_lines(folder / "a.jsonl", rows)


def in_parts(folder: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": ask}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "text": answer}], "loss_weight": 1.0},
                {"role": "user", "content": "Nobody answers this."},
            ]
        }
        for ask, answer in PAIRS
    ]
    return write_lines(folder / "a.jsonl", rows)


def alpaca(folder: Path) -> Path:
    rows = [{"instruction": ask, "input": " ", "output": answer, "system": ""} for ask, answer in PAIRS]
    return write_lines(folder / "a.jsonl", rows)


def completions(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl", [{"prompt": ask, "completion": answer} for ask, answer in PAIRS])


def completions_as_messages(folder: Path) -> Path:
    both = [chat(*pair)["messages"] for pair in PAIRS]
    return write_lines(folder / "a.jsonl", [{"prompt": each[:1], "completion": each[1:]} for each in both])


def by_columns(folder: Path) -> Path:
    rows = [{"messages": {"role": ["user", "assistant"], "content": list(pair)}} for pair in PAIRS]
    return write_lines(folder / "a.jsonl", rows)


FORMATS = (
    messages, one_list, parquet, as_csv, share_gpt, in_parts, alpaca, completions, completions_as_messages,
    by_columns,
)  # fmt: skip


def learnt_of(folder: Path, found: worker_pb2.PlanResult, **folders: Path) -> list[tuple[str, str]]:
    """What each conversation is as text, and what of it is learnt."""
    assert not found.violations, found.violations
    prepared = prepare(found.plan.resolved_spec, locations(folder, **folders))
    decode = prepared.inputs.tokenizer.decode
    pairs = []
    for at in range(prepared.train.num_samples):
        batch = prepared.train.micro_batch([SampleRef(0, at)])
        (ids,), (labels,) = batch.inputs["input_ids"], batch.inputs["labels"]
        assert batch.num_units == int((labels >= 0).sum()) > 0
        # A label is the token after it.
        known = labels[:-1] >= 0
        assert torch.equal(labels[:-1][known], ids[1:][known]) and labels[-1] < 0
        pairs.append((decode(ids), decode(labels[labels >= 0])))
    return pairs


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_each_format_is_the_same_conversation(write: Any, tmp_path: Path) -> None:
    found = planned(tmp_path, spec_of(write(tmp_path), evaluation={"holdout": 0}))
    pairs = learnt_of(tmp_path, found)
    assert len(pairs) == len(PAIRS)
    for (text, learnt), (ask, answer) in zip(pairs, PAIRS, strict=True):
        assert text == f"<|endoftext|><|user|>\n{ask}<|endoftext|>\n<|assistant|>\n{answer}<|endoftext|>\n"
        assert learnt == f"{answer}<|endoftext|>"
    assert planned(tmp_path, found.plan.resolved_spec).plan == found.plan


def test_a_plain_text_is_learnt_whole_with_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One line.\nAnother one.\n" * 4)
    pairs = learnt_of(tmp_path, planned(tmp_path, spec_of(tmp_path / "a.txt", evaluation={"holdout": 0})))
    assert pairs[0] == ("<|endoftext|>One line.<|endoftext|>", "One line.<|endoftext|>")


def test_a_message_of_weight_0_and_all_but_the_last_turn_may_be_left_out(tmp_path: Path) -> None:
    row = chat("a?", "first", "b?", "second", "c?", "third", system="Be short.")
    row["messages"][2]["train"] = False
    path = write_lines(tmp_path / "a.jsonl", [row] * 4)
    ((text, learnt), *_) = learnt_of(tmp_path, planned(tmp_path, spec_of(path, {"maxLength": 128})))
    assert learnt == "second<|endoftext|>third<|endoftext|>" and "Be short." in text
    last = planned(tmp_path, spec_of(path, {"maxLength": 128, "lastTurnOnly": True}))
    assert learnt_of(tmp_path, last)[0][1] == "third<|endoftext|>"


def rows_with(*said: Any, **more: Any) -> list[dict[str, Any]]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"messages": [{"role": names.get(role, role), "content": text} for role, text in said], **more}]


def answered(**keys: Any) -> list[dict[str, Any]]:
    """A row whose answer has other keys as well."""
    return [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}]


GOOD = [chat("a?", "b")]
REFUSED = {
    "two users": (rows_with(("u", "a"), ("u", "b"), ("a", "c")), "line 2: message 2: its role is user, but after one"),
    "an answer first": (rows_with(("a", "b"), ("u", "a")), "developer or user; put the messages in order"),
    "a late system": (rows_with(("u", "a"), ("s", "b"), ("a", "c")), "message 2: its role is system"),
    "an unknown role": (rows_with(("u", "a"), ("assistent", "b")), "did you mean assistant?"),
    "a blank question": (rows_with(("u", " \n"), ("a", "b")), "message 1: the user's message is empty"),
    "a blank answer": (rows_with(("u", "a"), ("a", "")), "message 2: the assistant's message is empty"),
    "no answer": (rows_with(("u", "a")), "no message is of the role assistant"),
    "no content": ([{"messages": [{"role": "user"}]}], "message 1: it has no `content`"),
    "no role": ([{"messages": [{"content": "a"}]}], "no `role` (or `from`)"),
    "a picture": (
        rows_with(("u", [{"type": "image_url", "image_url": "x"}]), ("a", "b")),
        "a part of the type 'image_url'; only texts",
    ),
    "a number": (rows_with(("u", 5), ("a", "b")), "the content '5', which is not a text"),
    "a weight": ([{"messages": [{"role": "user", "content": "a", "weight": 0.5}]}], "its weight is '0.5'"),
    "weights of 0": (
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}],
        "all answers have the weight 0",
    ),
    "nothing": ([{"messages": []}], "'messages' is an empty list"),
    "a text": ([{"messages": "user: hello"}], "write a list of messages"),
    "no messages": ([{"messages": None}], "'messages' is missing; write a list of messages"),
    "tools": (rows_with(("u", "a"), ("a", "b"), tools=[{"name": "f"}]), "it does not read `tools`"),
    "half a character": (rows_with(("u", "a \ud83d"), ("a", "b")), "message 1: its content has half of a surrogate"),
    "half a character in a tool": (
        rows_with(("u", "a"), ("a", "b"), tools=[{"name": "f", "of": [{"\ud83d": 1}]}]), "'tools' has half of",
    ),
    "half a character in a tool as text": (
        rows_with(("u", "a"), ("a", "b"), tools='[{"name": "\\ud83d"}]'), "'tools' has half of a surrogate",
    ),
    "NUL in a tool": (rows_with(("u", "a"), ("a", "b"), tools=[{"name": "\0"}]), "'tools' has a NUL character; remove"),
    "half a character in a call": (
        answered(tool_calls=[{"function": {"name": "f", "arguments": {"a": "\udc00"}}}]), "its tool_calls has half of",
    ),
    "half a character in an old call": (answered(function_call={"name": "\udc00"}), "its tool_calls has half of"),
    "half a character in a name": (answered(name="\udc00"), "message 2: its name has half of a surrogate pair"),
    "half a character in a thought": (answered(reasoning_content="\udc00"), "its reasoning_content has half of"),
    "NUL in a thought": (answered(reasoning_content="\0"), "its reasoning_content has a NUL character; remove it"),
    "an old call": (answered(content=None, function_call={"name": "f"}), "it does not read `tool_calls`"),
    "an old call that is a text": (answered(function_call="f"), "its function_call is 'f'; write it as {name, argum"),
    "an empty list of calls": (answered(content="", tool_calls=[]), "message 2: the assistant's message is empty"),
    "a call by the user": (
        [{"messages": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]}], "the user's message is empty",
    ),
    "broken tools": (rows_with(("u", "a"), ("a", "b"), tools="{"), "write a list of tools as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_conversation_is_refused_with_its_row_or_skipped(name: str, tmp_path: Path) -> None:
    rows, message = REFUSED[name]
    path = write_lines(tmp_path / "a.jsonl", [*GOOD, *rows, *GOOD * 4])
    (violation,) = planned(tmp_path, spec_of(path)).violations
    assert message in violation.message and violation.metadata["line"] == "2", violation
    assert violation.field == "spec.train_data" and violation.reason == "DATA_INVALID"
    lenient = {"uri": str(path), "maxBadRowsShare": 0.2}
    found = planned(tmp_path, spec_of(path, trainData=lenient, evaluation={"holdout": 0}))
    (left_out,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert found.plan.num_train_samples == 5 and "1 of 6 rows" in left_out.message and message[-20:] in left_out.message


SHARE_GPT = {"conversations": chat("a?", "b")["messages"], "system": "Be short."}
BY_DEVELOPER = [{"role": "developer", "content": "Be kind."}, *chat("a?", "b")["messages"]]
REFUSED_CELLS = {
    "text": ({"text": "fine"}, {"text": "hi \ud83d"}, "'text' has half of a surrogate pair; write the whole"),
    "NUL": ({"text": "fine"}, {"text": "hi \0"}, "'text' has a NUL character; remove it"),
    "prompt": ({"prompt": "a", "completion": "b"}, {"prompt": "\ud83d"}, "'prompt' has half of a surrogate"),
    "output": ({"instruction": "a", "output": "b"}, {"output": "\ud83d"}, "'output' has half of a surrogate"),
    "system": (SHARE_GPT, {"system": "\ud83d"}, "'system' has half of a surrogate pair"),
    "a list": (SHARE_GPT, {"system": ["Be short."]}, "'system' is \"['Be short.']\", which is not a text; write"),
    "an object": (SHARE_GPT, {"system": {"a": 1}}, "which is not a text; write a text in quotes, or leave it out"),
    "false": (SHARE_GPT, {"system": False}, "'system' is 'False', which is not a text"),
    "a developer": (SHARE_GPT, {"conversations": BY_DEVELOPER}, "message 1: it is a developer message, and the row"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CELLS)
def test_an_invalid_cell_is_refused_with_its_row_or_skipped(name: str, tmp_path: Path) -> None:
    good, change, message = REFUSED_CELLS[name]
    path = write_lines(tmp_path / "a.jsonl", [good, {**good, **change}, *[good] * 4])
    (violation,) = planned(tmp_path, spec_of(path)).violations
    assert message in violation.message and violation.metadata["line"] == "2", violation
    assert violation.metadata["file"].endswith("a.jsonl") and violation.reason == "DATA_INVALID"
    lenient = {"uri": str(path), "maxBadRowsShare": 0.2}
    found = planned(tmp_path, spec_of(path, trainData=lenient, evaluation={"holdout": 0}))
    assert found.plan.num_train_samples == 5 and not found.violations


def test_an_old_call_is_learnt_as_a_call(tmp_path: Path) -> None:
    reads = CHATML.replace("message['content']", "message.content + (message.tool_calls | default([]) | tojson)")
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, called]}] * 4)
    spec = spec_of(path, {"maxLength": 256, "chatTemplate": reads}, evaluation={"holdout": 0})
    learnt = learnt_of(tmp_path, planned(tmp_path, spec))[0][1]
    assert '[{"type": "function", "function": {"name": "f", "arguments": {}}}]' in learnt


def test_a_file_that_can_be_read_in_two_ways_is_refused_with_both_unless_a_role_is_mapped(tmp_path: Path) -> None:
    row = {"instruction": "a?", "input": "", "output": "b", "text": "### a?\n### b"}
    path = write_lines(tmp_path / "a.jsonl", [row] * 8)
    (violation,) = planned(tmp_path, spec_of(path)).violations
    assert violation.field == "spec.train_data.columns"
    assert "`instruction` and `output` or `text`" in violation.message
    mapped = {"uri": str(path), "columns": {"output": "output"}}
    assert learnt_of(tmp_path, planned(tmp_path, spec_of(path, trainData=mapped)))[0][1] == "b<|endoftext|>"
    whole = {"uri": str(path), "columns": {"text": "text"}}
    assert learnt_of(tmp_path, planned(tmp_path, spec_of(path, trainData=whole)))[0][1].startswith("### a?")


def test_what_is_longer_is_cut_and_what_has_no_answer_left_is_left_out_or_refused(tmp_path: Path) -> None:
    rows = [chat("a?", "b " * 40), chat("word " * 60, "never seen"), *GOOD * 6]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = planned(tmp_path, spec_of(path, {"maxLength": 32}, evaluation={"holdout": 0}))
    reasons = {warning.reason: warning for warning in found.plan.warnings}
    assert "in 1 of 8 conversations no answer begins within the first 32" in reasons["NO_ANSWER_LEFT"].message
    assert found.plan.num_train_samples == 7 and found.plan.train_stats.cut_share == pytest.approx(1 / 7)
    assert "TEXTS_CUT" in reasons
    path = write_lines(tmp_path / "b.jsonl", [chat("word " * 60, "never seen")] * 4)
    (violation,) = planned(tmp_path, spec_of(path, {"maxLength": 32})).violations
    assert "in none of 4 conversations" in violation.message and "raise max_length" in violation.message


def test_the_name_of_a_special_token_in_a_message_is_said(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [chat("a?", "b<|endoftext|>c"), *GOOD * 4])
    found = planned(tmp_path, spec_of(path))
    (warning,) = [each for each in found.plan.warnings if each.reason == "SPECIAL_TOKENS_IN_TEXT"]
    assert "in 1 of 5 conversations" in warning.message and "<|endoftext|>" in warning.message


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["derived", "marked"])
def test_a_model_whose_padding_is_its_end_learns_to_end(template: str, tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "model", template)
    path = write_lines(tmp_path / "a.jsonl", [chat("a?", "short"), chat("a?", "much longer", "b?", "again")] * 4)
    spec = spec_of(path, evaluation={"holdout": 0}, model={"uri": str(folder)})
    spec.ClearField("tokenizer")
    found = planned(tmp_path, spec)
    assert not [warning for warning in found.plan.warnings if warning.reason.startswith("CHAT_")]
    pairs = learnt_of(tmp_path, found)
    assert pairs[0][1] == "short<|im_end|>" and pairs[1][1] == "much longer<|im_end|>again<|im_end|>"
    # The template writes the token that a text begins with, and the tokenizer would too.
    assert pairs[0][0].count("<s>") == 1
    prepared = prepare(found.plan.resolved_spec, locations(tmp_path))
    batch = prepared.train.micro_batch([SampleRef(0, 0), SampleRef(0, 1)])
    end = prepared.inputs.tokenizer.pad_token_id
    assert prepared.inputs.tokenizer.eos_token_id == end and prepared.inputs.ends == (end,)
    assert (batch.inputs["labels"] == end).sum(1).tolist() == [1, 2]


def test_packed_conversations_have_the_losses_that_they_have_alone(tmp_path: Path) -> None:
    rows = [chat(f"{at}?", "b " * (at % 7 + 1)) for at in range(24)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    alone = planned(tmp_path, spec_of(path, evaluation={"holdout": 0})).plan.resolved_spec
    packed = spec_pb2.JobSpec()
    packed.CopyFrom(alone)
    packed.fine_tuning.instruction.packing = True
    tasks = [prepare(spec, locations(tmp_path)) for spec in (alone, packed)]
    sums, units = [], []
    for task in tasks:
        module = build_module(task, alone).eval()
        batches = [task.train.micro_batch([SampleRef(0, at)]) for at in range(task.train.num_samples)]
        with torch.no_grad():
            sums.append(float(sum(module(**batch.inputs).loss_sum for batch in batches)))
        units.append(sum(batch.num_units for batch in batches))
    assert units[0] == units[1] and sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert tasks[1].train.num_samples < tasks[0].train.num_samples
    assert tasks[0].train.num_tokens == tasks[1].train.num_tokens
    lengths = tasks[1].train.lengths()
    assert lengths is not None and lengths.max() <= 64
    batch = tasks[1].train.micro_batch([SampleRef(0, 0)])
    starts = np.flatnonzero(batch.inputs["position_ids"][0].numpy() == 0)
    assert len(starts) > 1
    module = build_module(tasks[1], alone).eval()
    changed = {name: tensor.clone() for name, tensor in batch.inputs.items()}
    changed["input_ids"][0, : starts[1]] = 5
    with torch.no_grad():
        hidden = [module.backbone(**_read(inputs)).last_hidden_state for inputs in (batch.inputs, changed)]
    assert torch.equal(hidden[0][0, starts[1] :], hidden[1][0, starts[1] :])


def _read(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor for name, tensor in inputs.items() if name != "labels"} | {"use_cache": False}


def test_what_does_not_fit_the_task_is_refused_with_what_would(tmp_path: Path) -> None:
    path = messages(tmp_path)
    (violation,) = planned(tmp_path, spec_of(path, model={"architecture": {"modelType": "bert"}})).violations
    assert violation.reason == "OBJECTIVE_UNSUPPORTED" and "use a causal model such as llama" in violation.message
    unknown = {"architecture": {"modelType": "bloom", "overrides": {"n_layer": 1, "hidden_size": 16, "n_head": 2}}}
    (violation,) = planned(tmp_path, spec_of(path, {"packing": True}, model=unknown)).violations
    assert violation.field == "spec.fine_tuning.instruction.packing" and "llama" in violation.message
    mapped = {"uri": str(path), "columns": {"labels": "x"}}
    (violation,) = planned(tmp_path, spec_of(path, trainData=mapped)).violations
    assert "conversations" in violation.message
