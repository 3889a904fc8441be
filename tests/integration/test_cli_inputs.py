"""What the command line reads: flags, spec files and texts; every slip is named, none is a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from helpers.scripted_service import Script, serving
from shardyard.cli.app import run
from shardyard.cli.texts import read_inputs


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
