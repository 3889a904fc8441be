"""What the command line reads: flags, spec files and texts; every slip is named, none is a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from google.protobuf import text_format

from helpers.scripted_service import Script, serving
from shardyard.cli.app import run
from shardyard.cli.texts import read_inputs
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
        ("job: {spec: {fine_tuning: text_classification}}", "", "job.spec.fine_tuning: `text_classification` where"),
        ("job: word", "--epochs 2", "job: `word` where fields are wanted; write them below it"),
        ("job:\n  spec: [a]", "--epochs 2", "job.spec: `['a']` where fields are wanted"),
        ("job:\n  spec:\n    optimization: fast", "--epochs 2", "job.spec.optimization: `fast` where fields"),
        ("job:\n  spec:\n    fineTuning: word", "--pooling mean", "job.spec.fine_tuning: `word` where fields"),
        (
            "job:\n  spec:\n    fine_tuning: {text_classification: word}",
            "--pooling mean",
            "job.spec.fine_tuning.text_classification: `word` where",
        ),
        (
            "job:\n  spec:\n    train_data: {uri: a.csv, columns: text}",
            "--text text",
            "job.spec.train_data.columns: `text` where",
        ),
        ("job:\n  spec:\n    optimization: fast", "--set spec.optimization.epochs=2", "`fast` stands there"),
        ("job:\n  spec:\n    fine_tuning:", "--pooling mean", "give --task as well"),
    ],
)
def test_a_word_where_fields_are_wanted_is_named_with_its_line(
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
            "job: {spec: {fineTuning: {textClassification: , maxLength: 8}}}",
            "--pooling mean --max-length 9",
            "fine_tuning {text_classification {pooling: POOLING_MEAN} max_length: 9}",
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


def test_a_pair_keeps_the_number_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "pairs").write_bytes(b"\xef\xbb\xbfa\tb\nc\n")
    with pytest.raises(typer.BadParameter, match="line 2: a pair is two texts"):
        read_inputs(None, tmp_path / "pairs", pairs=True)
