"""How the command line asks models: what is sent for each kind of input, and the command that shows how to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.command import shardyard
from helpers.script import Script
from helpers.scripted_service import a_job, a_story, serving
from shardyard.cli.app import run
from shardyard.v1 import job_pb2, model_service_pb2


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        (("image",), "./picture.jpg"),
        (("items",), "ITEM ITEM"),
        (("question", "pair"), "'some question' 'a text with the answer'"),
        (("messages", "text"), "'some question'"),
        (("pair",), "'some text' 'another text'"),
        ((), None),
    ],
)
def test_a_job_that_succeeded_shows_how_to_ask_its_model(
    capsys: pytest.CaptureFixture[str], inputs: tuple[str, ...], arguments: str | None
) -> None:
    job = a_job(state=job_pb2.STATE_SUCCEEDED)
    job.model = "projects/default/models/m"
    with serving(Script(job=job, events=a_story(), ready={"m"}, inputs=inputs)) as address:
        assert run(["watch", "story", "--address", address]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    asked = [f"shardyard predict m {arguments} --address {address}"] if arguments else []
    assert [line for line in lines if "predict" in line] == asked
    assert lines[-1] == f"shardyard download m ./m --address {address}"


@pytest.mark.parametrize(
    ("task", "kind", "parameters"),
    [
        ("image_classification", "image", None),
        ("recommendation", "items", "recommendation"),
        ("question_answering", "question", "question_answering"),
        ("instruction", "messages", None),
        ("text_classification", "text", None),
    ],
)
def test_a_model_that_does_not_say_what_it_takes_is_asked_by_its_task(
    tmp_path: Path, task: str, kind: str, parameters: str | None
) -> None:
    (tmp_path / "rose.png").write_bytes(b"petals")
    texts = {
        "image": [str(tmp_path / "rose.png")],
        "items": ["i1", "i2"],
        "question": ["Who?", "Anna did."],
        "messages": [],
        "text": ["a"],
    }
    given = [*texts[kind], *(["--message", "user: Hello"] if kind == "messages" else [])]
    script = Script(ready={"m"}, task=task)
    with serving(script) as address:
        assert run(["predict", "m", *given, *(["--top-k", "2"] if parameters else []), "--address", address]) == 0
    (request,) = script.asked("Predict")
    assert [each.WhichOneof("input") for each in request.instances] == [kind]
    assert request.WhichOneof("parameters") == parameters


def test_texts_come_from_stdin_too() -> None:
    script = Script(ready={"m"})
    with serving(script) as address:
        done = shardyard(address, "predict", "m", "--pairs", text="\ufeffa\tb\nc\u2028\td\n")
        wrong = shardyard(address, "predict", "m", "--pairs", text="a\n")
    assert done.returncode == 0, done.stderr
    assert [instance.pair.text for instance in script.asked("Predict")[0].instances] == ["a", "c\u2028"]
    assert (wrong.returncode, "line 1" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("inputs", "asked"),
    [
        ((), [("text", "rose.png"), ("text", "x")]),
        (("text", "pair"), [("text", "rose.png"), ("text", "x")]),
        (("image",), [("image", b"petals"), ("image", b"a cross")]),
        (("items",), [("items", ["rose.png", "x"])]),
        (("pair",), [("pair", model_service_pb2.TextPair(text="rose.png", text_pair="x"))]),
    ],
)
def test_arguments_are_what_the_model_says_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: tuple[str, ...], asked: list[tuple[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rose.png").write_bytes(b"petals")
    (tmp_path / "x").write_bytes(b"a cross")
    script = Script(ready={"m"}, inputs=inputs)
    with serving(script) as address:
        assert run(["predict", "m", "rose.png", "x", "--address", address]) == 0
    sent = [(each.WhichOneof("input"), each) for each in script.asked("Predict")[0].instances]
    assert [(kind, list(each.items.items) if kind == "items" else getattr(each, kind)) for kind, each in sent] == asked


def test_labels_of_the_callers_are_parameters_of_zero_shot() -> None:
    script = Script(ready={"m"}, task="text_classification")
    flags = ["--label", "sports", "--label", "food, drink", "--hypothesis-template", "About {}.", "--multi-label"]
    with serving(script) as address:
        assert run(["predict", "m", "a text", *flags, "--threshold", "0.2", "--address", address]) == 0
        assert run(["predict", "m", "a text", "--label", "x", "--top-k", "2", "--address", address]) == 1
    (request,) = script.asked("Predict")
    asked = request.zero_shot
    assert (list(asked.labels), asked.hypothesis_template) == (["sports", "food, drink"], "About {}.")
    assert (asked.multi_label, asked.threshold) == (True, 0.2)
