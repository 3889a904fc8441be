"""What the command line reads: flags, spec files and texts; every slip is named, none is a traceback."""

from __future__ import annotations

import json
import os
from contextlib import chdir
from pathlib import Path

import pytest
import typer
from google.protobuf import text_format

from helpers.script import Script
from helpers.scripted_service import serving
from shardyard.cli.app import run
from shardyard.cli.texts import read_inputs, read_questions
from shardyard.types import Question
from shardyard.v1 import spec_pb2


def test_a_set_value_goes_beside_data_that_a_flag_names(tmp_path: Path) -> None:
    script, data = Script(), tmp_path / "reviews.csv"
    data.write_text("good,1\n")
    arguments = ["submit", "--detach", "--task", "text-classification", "--model", "hub:owner/bert"]
    arguments += [
        "--train",
        str(data),
        "--set",
        "spec.train_data.header=true",
        "--set",
        "spec.train_data.delimiter=';'",
    ]
    with serving(script) as address:
        assert run([*arguments, "--address", address]) == 0
    source = script.asked("CreateJob")[0].job.spec.train_data
    assert source.dataset.startswith("projects/default/datasets/d-")
    assert (source.header, source.delimiter) == (True, ";")


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("job: {spec: {fine_tuning: text_classification}}", "", "job.spec.fine_tuning: `text_classification` is given"),
        ("job: word", "--epochs 2", "job: `word` is given, but fields are needed; write them below it"),
        ("job:\n  spec: [a]", "--epochs 2", "job.spec: `['a']` is given, but fields are needed"),
        ("job:\n  spec:\n    optimization: fast", "--epochs 2", "job.spec.optimization: `fast` is given, but fields"),
        ("job:\n  spec:\n    fineTuning: word", "--pooling mean", "job.spec.fine_tuning: `word` is given, but fields"),
        (
            "job:\n  spec:\n    fine_tuning: {text_classification: word}",
            "--pooling mean",
            "job.spec.fine_tuning.text_classification: `word` is given",
        ),
        (
            "job:\n  spec:\n    train_data: {uri: a.csv, columns: text}",
            "--text text",
            "job.spec.train_data.columns: `text` is given",
        ),
        ("job:\n  spec:\n    optimization: fast", "--set spec.optimization.epochs=2", "its value is `fast`"),
        ("job:\n  spec:\n    fine_tuning:", "--pooling mean", "give --task as well"),
    ],
)
def test_a_word_in_place_of_fields_is_named_with_its_line(
    text: str, flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    assert run(["submit", str(tmp_path / "spec.yaml"), *flags.split(), "--address", "127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "--task" in words or f"(spec.yaml:{len(text.splitlines())})" in error


@pytest.mark.parametrize(
    ("text", "flags", "wanted"),
    [
        ("", "", ""),
        ("job:", "--epochs 2", "optimization {epochs: 2}"),
        ("job:\n  spec:", "--epochs 2", "optimization {epochs: 2}"),
        ("job: {spec: {optimization: }}", "--epochs 2", "optimization {epochs: 2}"),
        ("job: {spec: {feature_extraction: }}", "--epochs 2", "optimization {epochs: 2}"),
        ("job: {spec: {feature_extraction: }}", "--pooling mean", "feature_extraction {pooling: POOLING_MEAN}"),
        (
            "job: {spec: {fineTuning: {textClassification: {maxLength: 8}}}}",
            "--pooling mean --max-length 9",
            "fine_tuning {text_classification {pooling: POOLING_MEAN max_length: 9}}",
        ),
    ],
)
def test_flags_go_into_what_a_file_leaves_empty(text: str, flags: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(text or "job: {spec: {feature_extraction: }}")
    script = Script()
    with serving(script) as address:
        assert run(["submit", str(tmp_path / "spec.yaml"), *flags.split(), "--detach", "--address", address]) == 0
    assert script.asked("CreateJob")[0].job.spec == text_format.Parse(wanted, spec_pb2.JobSpec())


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        ("a\x0bb\x0cc\x85d\u2028e\rf\nlast".encode(), ["a\x0bb\x0cc\x85d\u2028e\rf", "last"]),
        (b"one\r\n two \r\n\r\n\n", ["one", " two "]),
        (b"\n", []),
        (b"", []),
    ],
)
def test_a_line_of_a_file_is_a_text(raw: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(raw)
    assert read_inputs(None, tmp_path / "texts", pairs=False) == texts


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"one\n\nthree\n", "line 2: is blank"),
        (b"\r\none\r\n", "line 1: is blank"),
        (b"one\nt\xff", "line 2: byte 2 is not UTF-8"),
        ("one".encode("utf-16"), "line 1: byte 1 is not UTF-8"),
    ],
)
def test_a_line_without_a_text_is_refused_with_its_number(raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(raw)
    with pytest.raises(typer.BadParameter, match=words):
        read_inputs(None, tmp_path / "texts", pairs=False)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["plan", "--task", "text-classification", "--model", "hub:a/b", "--train", ""], "job.spec.train_data"),
        (["plan", "--task", "text-classification", "--train", "server:/d", "--eval", " "], "job.spec.eval_data"),
        (["plan", "--task", "feature-extraction", "--data", ""], "job.spec.feature_extraction.data"),
        (["plan", "--task", "causal-lm", "--model", ""], "job.spec.model"),
        (["plan", "--task", "causal-lm", "--tokenizer", ""], "job.spec.tokenizer"),
        (["plan", "spec.yaml"], "job.spec.eval_data"),
        (["plan", "--task", "causal-lm", "--set", "spec.train_data=''"], "job.spec.train_data"),
        (["plan", ""], "FILE.yaml"),
        (["upload", ""], "PATH"),
        (["upload", "--model", " "], "PATH"),
        (["download", "m", ""], "FOLDER"),
        (["predict", "m", "--file", ""], "--file"),
        (["stop", "--state-dir", ""], "--state-dir"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    arguments: list[str], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.yaml").write_text("job: {spec: {train_data: 'server:/d', eval_data: ''}}")
    (tmp_path / "secret").write_text("not to be sent")
    script = Script(ready={"m"})
    with serving(script) as address, chdir(tmp_path):
        assert run([*arguments, *([] if arguments[0] == "stop" else ["--address", address])]) == 2
    error = capsys.readouterr().err
    assert field in error and "is empty; give a path" in error
    assert script.requests == []


BYTE = os.fsdecode(b"\xff")  # As Python hands over an argument that is not UTF-8.


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["plan", "--task", "causal-lm", "--train", f"server:/d/{BYTE}.csv"], "--train"),
        (["submit", "--task", "causal-lm", "--job-id", BYTE], "--job-id"),
        (["submit", "--task", "causal-lm", "--display-name", BYTE], "--display-name"),
        (["submit", "--task", "causal-lm", "--train", "server:/d", "--text", BYTE], "--text"),
        (["submit", "--task", "causal-lm", "--set", f"labels.team={BYTE}"], "--set"),
        (["jobs", "--filter", BYTE], "--filter"),
        (["jobs", "--project", BYTE], "--project"),
        (["jobs", "--address", f"{BYTE}:1"], "--address"),
        (["metrics", "j", "loss", BYTE], "METRIC"),
        (["get", BYTE], "JOB"),
        (["predict", "m", "fine", f"caf{BYTE}"], "TEXT"),
        (["delete", BYTE], "NAME"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_named(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Script(ready={"m"})) as address:
        assert run([*arguments[:1], "--address", address, *arguments[1:]]) == 2
        assert run([*arguments[:1], "--address", address, *arguments[1:], "--json"]) == 2
    said = capsys.readouterr()
    assert field in said.err and "\\xff" in said.err and "is not UTF-8; write it in UTF-8" in said.err
    assert field in json.loads(said.out)["error"]["message"]


def test_a_local_path_may_have_any_name_but_what_is_sent_may_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / BYTE
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / "good.csv").write_text("a,b\n1,2\n")
    script = Script()
    with serving(script) as address:
        assert run(["upload", str(folder), "--address", address]) == 0
        assert len(script.uploads) == 1
        (folder / f"bad{BYTE}.csv").write_text("a")
        for path in (folder, folder / f"bad{BYTE}.csv"):
            assert run(["upload", str(path), "--address", address]) == 1
            assert "`bad\\xff.csv` is not UTF-8; rename the file" in capsys.readouterr().err
    assert len(script.uploads) == 1


def test_a_pair_keeps_the_number_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "pairs").write_bytes(b"\xef\xbb\xbfa\tb\nc\n")
    with pytest.raises(typer.BadParameter, match="line 2: a pair is two texts"):
        read_inputs(None, tmp_path / "pairs", pairs=True)


def test_questions_are_options_arguments_or_lines(tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("\ufeffGoethe wrote\nFaust.")
    asked = Question("Who?", "Goethe wrote\nFaust.")
    assert read_questions(None, None, "Who?", f"@{tmp_path / 'context.txt'}") == [asked]
    assert read_questions(["Who?", asked.context, "b", "c"], None, None, None) == [asked, Question("b", "c")]
    lines = [json.dumps({"question": "Who?", "context": asked.context, "id": 3}), "b\tc"]
    (tmp_path / "lines").write_text("\n".join(lines))
    assert read_questions(None, tmp_path / "lines", None, None) == [asked, Question("b", "c")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((["Who?"], None, None, None), "each question needs its context"),
        ((None, None, "Who?", None), "give --question and --context together"),
        ((None, None, "Who?", "@/nowhere/at/all"), "`/nowhere/at/all` cannot be read"),
        ((None, '{"question": "Who?"}', None, None), "line 1: has no 'context'"),
        ((None, "a\tb\n{'question'", None, None), "line 2: is not JSON"),
        ((None, "Who?", None, None), "line 1: a pair is two texts"),
    ],
)
def test_a_question_without_its_context_is_refused(
    given: tuple[list[str] | None, str | None, str | None, str | None], words: str, tmp_path: Path
) -> None:
    texts, lines, question, context = given
    if lines is not None:
        (tmp_path / "lines").write_text(lines)
    with pytest.raises(typer.BadParameter, match=words):
        read_questions(texts, tmp_path / "lines" if lines is not None else None, question, context)
