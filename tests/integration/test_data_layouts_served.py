"""Data as people have it through the public calls of a real service: planned, trained on, asked, or refused."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shardyard
from helpers.chat_folders import WITH_TOOLS, chat_folder
from helpers.served import Served, served
from helpers.small_specs import OVERRIDES, sentences
from shardyard.cli.app import run

JOB_S = 240.0
MODEL = shardyard.Architecture("bert", {**OVERRIDES["bert"], "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("service"), "local") as found:
        yield found


def comments(path: Path) -> Path:
    """A table as of a contest: an id, a comment, and a column of 0 and 1 for each class."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "comment", "toxic", "insult", "threat"])
        for i, text in enumerate(sentences(48)):
            writer.writerow([f"c{i}", text, i % 2, int(i % 3 == 0), int(i % 8 == 0)])
    return path


def trained(task: shardyard.TextClassification, data: shardyard.Data) -> shardyard.JobSpec:
    return shardyard.JobSpec(
        task,
        model=MODEL,
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 120),
        train_data=data,
        optimization=shardyard.Optimization(max_steps=3, global_batch_size=16),
    )


def test_a_job_with_a_column_for_each_class_trains_and_answers_with_them(service: Served, tmp_path: Path) -> None:
    data = shardyard.Data(comments(tmp_path / "train.csv"), text="comment")
    columns = ["threat", "toxic", "insult"]
    with shardyard.Client(service.address) as client:
        task = shardyard.TextClassification(problem="multi_label", label_columns=columns, max_length=16)
        job = client.submit(trained(task, data))
        done = job.wait(timeout=JOB_S)
        assert done.state == "succeeded"
        (answer,) = job.model().predict(["the quick brown fox"])
    assert list(answer.scores) == ["threat", "toxic", "insult"]


def test_a_job_on_a_packed_file_trains_and_answers(service: Served, tmp_path: Path) -> None:
    rows = [
        json.dumps({"text": text, "label": ["good", "Good ", "bad"][i % 3]}) for i, text in enumerate(sentences(48))
    ]
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    with shardyard.Client(service.address) as client:
        spec = trained(shardyard.TextClassification(max_length=16), shardyard.Data(path))
        plan = client.plan(spec)
        assert plan.train_stats is not None and plan.train_stats.num_samples == plan.num_train_samples
        assert "LOOKALIKE_LABELS" in [warning.reason for warning in plan.warnings]
        job = client.submit(spec)
        job.wait(timeout=JOB_S)
        (answer,) = job.model().predict(["the quick brown fox"])
    assert answer.label in ("good", "bad")


def arguments(command: str, data: Path, *more: str) -> list[str]:
    shape = [f"--set=spec.model.architecture.overrides.{name}={value}" for name, value in OVERRIDES["bert"].items()]
    fresh = ["--architecture", "bert", *shape, "--set", "spec.tokenizer.train.vocab_size=300"]
    return [command, "--task", "text-classification", *fresh, "--train", str(data), "--max-steps", "2", *more]


def test_the_command_line_maps_columns_and_shows_what_is_cut(
    service: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = comments(tmp_path / "train.csv")
    columns = ["--text", "comment", "--label-column", "threat", "--label-column", "toxic"]
    flags = ["--problem", "multi-label", *columns, "--max-length", "8", "--address", service.address]
    assert run(arguments("plan", data, *flags)) == 0
    shown = capsys.readouterr().out
    assert "threat, toxic" in shown and "% of the texts cut, 0.0 % of the tokens unknown" in shown
    assert "warning TEXTS_CUT" in shown
    (tmp_path / "joined.csv").write_text("text,label\n" + 'a fox,"x / y"\na dog,x\n' * 9)
    flags = ["--problem", "multi-label", "--label-separator", "/", "--address", service.address]
    assert run(arguments("plan", tmp_path / "joined.csv", *flags)) == 0
    assert "x, y" in capsys.readouterr().out


TAGGED = {
    "kaggle.csv": (
        "Sentence #,Word,POS,Tag\n"
        + "".join(
            f"Sentence: {at},Anna,NNP,B-per\n,met,VBD,O\nSentence: {at + 1},Rome,NNP,B-geo\n" for at in range(1, 19, 2)
        ),
        {},
    ),
    "doccano.jsonl": ('{"id": 1, "text": "Anna met Rome", "label": [[0, 4, "per"], [9, 13, "geo"]]}\n' * 9, {}),
    "ud.conll": (
        "# sent_id = 1\n1\tAnna\t_\tB-per\t_\n2\tmet\t_\tO\t_\n3\tRome\t_\tB-geo\t_\n\n" * 9,
        {"tags": "column_4"},
    ),
}


@pytest.mark.parametrize("name", TAGGED)
def test_tagged_words_of_other_tools_are_planned_or_refused_with_their_line(
    service: Served, tmp_path: Path, name: str
) -> None:
    content, columns = TAGGED[name]
    path = tmp_path / name
    for text, is_good in (
        (content, True),
        (content.replace("met,", ",").replace("B-per", "B_per").replace("9, 13", "9, 12"), False),
    ):
        path.write_text(text)
        spec = shardyard.JobSpec(
            shardyard.TokenClassification(max_length=16),
            model=MODEL,
            tokenizer=shardyard.TrainedTokenizer("wordpiece", 120),
            train_data=shardyard.Data(path, columns=columns),
            optimization=shardyard.Optimization(max_steps=3, global_batch_size=4),
        )
        with shardyard.Client(service.address) as client:
            if is_good:
                plan = client.plan(spec)
                assert list(plan.labels) == ["O", "B-geo", "I-geo", "B-per", "I-per"]
                continue
            with pytest.raises(shardyard.InvalidArgument) as caught:
                client.plan(spec)
            (violation,) = caught.value.violations
            assert f"{name}, line " in violation.message and violation.field == "job.spec.train_data"


def test_bad_rows_are_left_out_and_shown_or_refused_before_the_job_queues(service: Served, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "a fox,good\na dog,bad\n" * 9 + "a cat,with,commas\n")
    task = shardyard.TextClassification(max_length=16)
    with shardyard.Client(service.address) as client:
        plan = client.plan(trained(task, shardyard.Data(path, max_bad_rows_share=0.1)))
        (told,) = [warning.message for warning in plan.warnings if warning.reason == "BAD_ROWS_LEFT_OUT"]
        assert told.startswith("1 of 19 rows cannot be used and are left out: train.csv, line 20: 3 values")
        with pytest.raises(shardyard.InvalidArgument) as caught:
            client.submit(trained(task, shardyard.Data(path, max_bad_rows_share=0.05)), job_id="never")
        (violation,) = caught.value.violations
        assert violation.field == "job.spec.train_data" and "1 of 19 rows cannot be used" in violation.message
        with pytest.raises(shardyard.NotFound):
            client.job("never").refresh()


def test_conversations_with_tools_are_the_same_in_every_form_and_what_is_not_read_is_named(
    service: Served, tmp_path: Path
) -> None:
    template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}

    def row(arguments: object, **more: object) -> dict[str, object]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        asked = [{"role": "user", "content": "It is?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        said = [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7."}]
        return {"messages": [*asked, *said], "tools": [tool], **more}

    def planned(name: str, rows: list[dict[str, object]]) -> shardyard.Plan:
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        return client.plan(
            shardyard.JobSpec(
                shardyard.Instruction(max_length=512, chat_template=template),
                model=shardyard.Architecture("llama", OVERRIDES["llama"]),
                tokenizer=shardyard.TrainedTokenizer("byte_bpe", 300),
                train_data=path,
                optimization=shardyard.Optimization(max_steps=1, global_batch_size=2),
            )
        )

    with shardyard.Client(service.address) as client:
        first = planned("a.jsonl", [row({"city": "Paris"})] * 4)
        assert "DATA_NOT_READ" not in [warning.reason for warning in first.warnings]
        for name, rows in (
            ("b.jsonl", [row('{"city": "Paris"}')] * 4),
            ("c.parquet", [row({"city": "Paris"}, topic=7)] * 4),
        ):
            plan = planned(name, rows)
            assert plan.train_stats.num_tokens == first.train_stats.num_tokens
        (told,) = [warning.message for warning in plan.warnings if warning.reason == "DATA_NOT_READ"]
        assert "column 'topic' (4 rows)" in told
        longer = planned("d.jsonl", [row({"city": "Paris"}, system="Be short.")] * 4)
        assert longer.train_stats.num_tokens > first.train_stats.num_tokens
        with pytest.raises(shardyard.InvalidArgument) as caught:
            planned("e.jsonl", [{"prompt": "q", "completion": "a", "label": each} for each in (True, False)])
        (violation,) = caught.value.violations
        assert "line 2: its label is 'False': the answer is a bad one" in violation.message


def test_an_uploaded_model_is_offered_tools_and_answers_their_results(
    service: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chat_folder(tmp_path / "talker", WITH_TOOLS)
    (folder / "shardyard.json").write_text(json.dumps({"format": 1, "task": "instruction", "max_length": 256}))
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    asked = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    wanted = plain_answer(folder, **asked)
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    with shardyard.Client(service.address) as client:
        model = client.upload_model(folder)
        (answer,) = model.predict([asked], max_new_tokens=8)
        assert answer.text == wanted
        with pytest.raises(shardyard.InvalidArgument) as caught:
            model.predict([messages[:1], {"messages": messages[:1], "tools": ["{"]}])
        assert [each.field for each in caught.value.violations] == ["instances[1].messages.tools[0]"]
    capsys.readouterr()
    flags = ["--max-new-tokens", "8", "--address", service.address, "--json"]
    assert run(["predict", model.id, "--file", str(tmp_path / "asked.jsonl"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == wanted


@torch.inference_mode()
def plain_answer(folder: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


REFUSED = {
    "a.csv": (pickle.dumps({"text": ["x"]}), "pickles are never opened"),
    "b.csv": ("text,label\nx,1\n".encode("utf-16"), "save it as UTF-8"),
    "c.jsonl.gz": (gzip.compress(b'{"text": "x", "label": 1}\n' * 999)[:40], "cut short"),
    "d.parquet": (b"PAR1" + bytes(99), "copy it again"),
    "e.jsonl": (b"{" + b",".join(b'"k%d": 1' % (i // 2) for i in range(40_000)) + b"}", "duplicate key 'k0'"),
    "f.zip": (b"PK\x03\x04" + bytes(99), "unpack it"),
    "g.txt.gz": (gzip.compress(b"\n" * 1_200_000), "decodes to more than"),
}


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_files_that_are_not_read_are_refused_by_name_and_the_service_continues(
    service: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name, (content, words) in REFUSED.items():
        (tmp_path / name).write_bytes(content)
        assert run(arguments(command, tmp_path / name, "--address", service.address)) != 0
        error = capsys.readouterr().err
        assert words in error and "train_data" in error, (name, error)
    with shardyard.Client(service.address) as client:
        assert client.server_info().version


FOUND = [
    (
        shardyard.SentenceEmbedding(max_length=16),
        {"query": "a dog", "passage": "a fox", "label": 0},
        "the column 'label' is not read beside anchor and positive",
    ),
    (shardyard.SentenceEmbedding(max_length=16), {"query": "a dog", "pos": "a fox", "neg1": "a cat", "neg2": "x"}, 4),
    (shardyard.Reranking(max_length=16), {"query": "a dog", "answer": ["a fox", "a cat"], "labels": [1, 0]}, 2),
    (
        shardyard.Reranking(max_length=16),
        {"query": "a dog", "answer": "a fox", "negative_1": "a", "negative_2": "x"},
        3,
    ),
]


@pytest.mark.parametrize(("task", "row", "wanted"), FOUND, ids=["judged pairs", "neg1", "labelled lists", "n-tuples"])
def test_mined_rows_are_planned_with_all_that_they_say(
    service: Served, tmp_path: Path, task: shardyard.SentenceEmbedding | shardyard.Reranking, row: dict[str, object],
    wanted: str | int,
) -> None:  # fmt: skip
    """`wanted`: the texts of a sentence embedding's sample or the pairs of a query; or a part of the refusal."""
    words = sentences(24)
    rows = [{**row, "query": f"{text} {row['query']}"} for text in words]
    if "pos" in row:
        rows = [{**each, "pos": f"{text} fox"} for each, text in zip(rows, words, strict=True)]
    data = shardyard.Data(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    spec = shardyard.JobSpec(
        task,
        model=MODEL,
        tokenizer=shardyard.TrainedTokenizer("wordpiece", 120),
        train_data=data,
        optimization=shardyard.Optimization(max_steps=1, global_batch_size=4),
        evaluation=shardyard.EvaluationPolicy(holdout=0),
    )
    with shardyard.Client(service.address) as client:
        if isinstance(wanted, str):
            with pytest.raises(shardyard.InvalidArgument, match=wanted):
                client.plan(spec)
            return
        plan = client.plan(spec)
        shorter = [{name: each[name] for name in list(row)[:-1]} for each in rows]
    if isinstance(task, shardyard.Reranking):
        assert plan.num_train_samples == wanted * len(rows)
        return
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in shorter))
    with shardyard.Client(service.address) as client:
        less = client.plan(spec)
    assert plan.train_stats is not None and less.train_stats is not None
    assert plan.train_stats.num_tokens > less.train_stats.num_tokens
