"""Data files of every kind: what is read, and what is refused with its line."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from helpers import small_specs
from helpers.small_specs import read_source
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError, SpecError
from shardyard_trainer.data.sources import resolve_source


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ACCEPTED = [
    ("a.csv", "text,label\nhello,1\n", [("hello", "1")]),
    ("a.csv", "\ufefftext,label\r\nhello,1\r\n", [("hello", "1")]),
    ("a.csv", 'text,label\n"two\nlines",1\n"say ""hi""",0\n', [("two\nlines", "1"), ('say "hi"', "0")]),
    ("a.csv", "label,text\n1,hello\n", [("hello", "1")]),
    ("a.csv", "text,label,,\nhello,1,,\n", [("hello", "1")]),
    ("a.csv", ",text,label\n0,hello,1\n", [("hello", "1")]),
    ("a.csv", "id,text,label,id\n0,hello,1,0\n", [("hello", "1")]),
    ("a.tsv", '"Great"\t1\n"" or "a"\t0\n"\t1\n', [('"Great"', "1"), ('"" or "a"', "0"), ('"', "1")]),
    ("a.csv", "a film,1\nanother,0\n", [("a film", "1"), ("another", "0")]),
    ("a.tsv", 'a "film\t1\nanother\t0\n', [('a "film', "1"), ("another", "0")]),
    ("a.tsv", "sentence\tlabel\na film\t1\n", [("a film", "1")]),
    ("a.jsonl", '{"text": "hello", "label": 1}\n\n{"label": 0, "text": "x"}\n', [("hello", 1), ("x", 0)]),
    ("a.ndjson", '{"text": "hello", "label": ["a", "b"]}', [("hello", ["a", "b"])]),
    ("a.jsonl", '{"text": "no label"}\n{"text": "x", "label": ["a"]}\n', [("no label", None), ("x", ["a"])]),
]


@pytest.mark.parametrize(("name", "content", "expected"), ACCEPTED)
def test_a_good_file_is_read(tmp_path: Path, name: str, content: str, expected: list[tuple[str, Any]]) -> None:
    assert [(row.text, row.label) for row in read_source(write(tmp_path, name, content))] == expected


def _nested(depth: int) -> str:
    return '{"text": "x", "label": ' + "[" * depth + "]" * depth + "}\n"


REFUSED = [
    ("empty", "a.csv", "", {}, "the file is empty", 0),
    ("empty lines", "a.txt", "\n \n", {}, "the file is empty", 0),
    ("header only", "a.csv", "text,label\n", {}, "no rows after the header", 0),
    ("missing column", "a.csv", "text,label\nx,1\n", {"columns": {"text": "txet"}}, "did you mean text?", 0),
    ("mapped twice", "a.csv", "text,label\nx,1\n", {"columns": {"text": "text", "label": "text"}}, "mapped twice", 0),
    ("column twice", "a.csv", "text,text,label\nx,y,1\n", {}, "2 columns are called 'text'", 0),
    ("label twice", "a.csv", "text,label,label\nx,0,1\n", {}, "2 columns are called 'label'", 0),
    ("pair twice", "a.csv", "text,text_pair,label,text_pair\nx,y,1,z\n", {}, "are called 'text_pair'", 0),
    ("mapped, twice", "a.csv", "a,a,label\nx,y,1\n", {"columns": {"text": "a"}}, "2 columns are called 'a'", 0),
    ("two of a name", "a.csv", "label,a,a\n1,x,y\n", {}, "several could be (a, a)", 0),
    ("quoted TSV header", "a.tsv", '"text"\t"label"\n"fine"\t"1"\n', {}, "give format CSV and a tab", 1),
    ("quoted TSV", "a.tsv", 'text\tlabel\nfine\t1\n"so ""fine"""\t1\n', {}, "give format CSV and a tab", 3),
    ("bad bytes", "a.csv", b"text,label\nx,1\n\xff,0\n", {}, "byte 16 of the file (0xff) is not UTF-8", 3),
    ("NUL", "a.csv", b"text,label\nx,1\na\0b,0\n", {}, "NUL", 3),
    ("long line", "a.txt", b"x\n" + b"y" * (17 * 2**20), {}, "longer than 16 MiB", 2),
    ("open quote", "a.csv", 'text,label\nx,1\n"open,0\ny,1\n', {}, "never closed", 3),
    ("after a quote", "a.csv", 'text,label\n"a"b,1\n', {}, "follows a closing quote", 2),
    ("wide row", "a.csv", "text,label\nx,1\na,b,c,d,0\n", {}, "5 values in a row of 2 columns", 3),
    ("narrow row", "a.tsv", "text\tlabel\nx\n", {}, "1 values in a row of 2 columns", 2),
    ("semicolons", "a.csv", "text;label\nx;1\n", {}, "is its delimiter ';'?", 0),
    ("commas in semicolons", "a.csv", "text;label\na, b;1\n", {}, "is `;` between the columns?", 2),
    ("wrong mapping and semicolons", "a.csv", "text;label\nx;1\n", {"columns": {"label": "label"}}, "delimiter", 0),
    ("header not known", "a.csv", "Review,Stars\nfine,5\n", {}, "(Review, Stars) was not taken for a header", 0),
    ("all empty", "a.csv", "text,label\n,1\n  ,0\n", {}, "the text of every row is empty", 0),
    (
        "second text later",
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "text_pair": "c", "label": 0}\n',
        {},
        "missing",
        1,
    ),
    ("two texts", "a.csv", "a,b,c\nx,y,z\n", {}, "several could be", 0),
    ("no text", "a.csv", "1,2\n3,4\n", {}, "none holds text", 0),
    ("NaN", "a.jsonl", '{"text": "x", "label": NaN}\n', {}, "NaN is not a JSON number", 1),
    ("overflow", "a.jsonl", '{"text": "x", "label": 1e999}\n', {}, "too large", 1),
    ("doubled key", "a.jsonl", '{"text": "x", "text": "y"}\n', {}, "duplicate key", 1),
    ("deep", "a.jsonl", _nested(10_000), {}, "nested deeper than 64", 1),
    ("cut", "a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "la', {}, "not JSON", 2),
    ("no object", "a.jsonl", '["x"]\n', {}, "not a JSON object", 1),
    (
        "huge integer",
        "a.jsonl",
        '{"text": "x", "label": ' + "9" * 5000 + "}\n",
        {},
        "5,000 digits; a number has at most",
        1,
    ),
    ("CR only", "a.csv", "text,label\rx,1\ry,0\r", {}, "lines end with a lone CR", 1),
    (
        "text for the pair",
        "a.csv",
        "text,label\nx,1\n",
        {"columns": {"text_pair": "text"}},
        "the column `text` is mapped as text_pair, and no other is left to be the text",
        0,
    ),
    ("half a surrogate", "a.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, "surrogate", 1),
    ("escaped NUL", "a.jsonl", '{"text": "a\\u0000", "label": 1}\n', {}, "NUL", 1),
    ("number for text", "a.jsonl", '{"text": 3, "label": 1}\n', {}, "must be text", 1),
    ("text left out", "a.jsonl", '{"text": "x", "label": 1}\n{"label": 1}\n', {}, "missing", 2),
    ("too many columns", "a.csv", ",".join(f"c{i}" for i in range(1025)) + "\n", {}, "at most 1,024", 1),
    ("too many keys", "a.jsonl", "{" + ",".join(f'"c{i}": 1' for i in range(1025)) + "}", {}, "at most 1,024", 1),
    ("no Parquet", "a.parquet", b"PAR1nonsense", {}, "not a readable Parquet file", 0),
]


@pytest.mark.parametrize("case", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, case: tuple[str, str | bytes, dict[str, Any], str, int]
) -> None:
    name, content, source, message, line = case
    with pytest.raises(DataError) as caught:
        read_source(write(tmp_path, name, content), **source)
    assert message in caught.value.message
    named = "" if "every row" in message else name
    assert (caught.value.reason, caught.value.line, caught.value.file) == ("DATA_INVALID", line, named)
    assert caught.value.field.startswith("spec.train_data")
    assert len(caught.value.message) < 1000


def test_a_missing_column_is_said_of_its_field_with_those_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_source(write(tmp_path, "a.csv", "review,stars\nx,1\n"), columns={"text": "review", "label": "star"})
    assert caught.value.field == "spec.train_data.columns.label"
    assert "review, stars" in caught.value.message and "did you mean stars?" in caught.value.message


def test_a_line_of_a_hundred_megabytes_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as stream:
        stream.truncate(0)
        for _ in range(100):
            stream.write(b"x" * 2**20)
    tracemalloc.start()
    with pytest.raises(DataError):
        read_source(path, with_label=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_a_text_file_is_lines_or_one_document(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\r\n\ntwo\n")
    assert [row.text for row in read_source(path, with_label=False)] == ["one", "two"]
    assert [row.text for row in read_source(path, with_label=False, document="DOCUMENT_UNIT_FILE")] == ["one\n\ntwo\n"]


def test_a_header_is_what_names_the_mapped_columns_or_what_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "review,stars\nfine,5\n")
    assert [r.text for r in read_source(path, columns={"text": "review", "label": "stars"})] == ["fine"]
    columns = {"text": "column_1", "label": "column_2"}
    assert [r.text for r in read_source(path, header=False, columns=columns)] == ["review", "fine"]
    assert [r.text for r in read_source(path, header=True)] == ["fine"]


@pytest.mark.parametrize("name", ["review", "Review_Text", "body.raw"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_header_over_one_column_is_not_taken_for_a_text(tmp_path: Path, name: str, ending: str) -> None:
    path = write(tmp_path, f"a.{ending}", f"{name}\na fine film\nawful\nnot bad\n")
    with pytest.raises(DataError) as caught:
        read_source(path, with_label=False)
    assert f"the first line ({name}) was not taken for a header" in caught.value.message
    assert caught.value.field == "spec.train_data.columns.text"
    assert [row.text for row in read_source(path, with_label=False, header=False)] == [
        name,
        "a fine film",
        "awful",
        "not bad",
    ]
    for source in ({"header": True}, {"columns": {"text": name}}):
        assert [row.text for row in read_source(path, with_label=False, **source)] == [
            "a fine film",
            "awful",
            "not bad",
        ]


@pytest.mark.parametrize("lines", [["Great!", "a fine film"], ["1984", "a fine film"], ["fox", "dog", "two words"]])
def test_one_column_without_a_header_is_read_from_its_first_line(tmp_path: Path, lines: list[str]) -> None:
    path = write(tmp_path, "a.csv", "\n".join(lines) + "\n")
    assert [row.text for row in read_source(path, with_label=False)] == lines


def test_a_cell_without_a_name_is_called_by_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,,\nfine,x,1\n")
    assert [row.label for row in read_source(path, columns={"label": "column_3"})] == ["1"]


def test_a_duplicate_label_column_does_not_matter_if_no_label_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label,label\nfine,0,1\n")
    assert [row.text for row in read_source(path, with_label=False)] == ["fine"]


def test_a_tsv_with_quotes_is_read_as_csv_with_tabs(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"so ""fine"""\t1\n"two\twords"\t0\n')
    rows = read_source(path, format="DATA_FORMAT_CSV", delimiter="\t")
    assert [(row.text, row.label) for row in rows] == [('so "fine"', "1"), ("two\twords", "0")]


def test_a_second_text_is_read_if_there_is_one(tmp_path: Path) -> None:
    rows = read_source(write(tmp_path, "a.csv", "text,text_pair,label\na,b,1\n"))
    assert (rows[0].text, rows[0].text_pair, rows[0].label) == ("a", "b", "1")


REFUSED_PATHS = [
    ("/etc/passwd", "PATH_NOT_ALLOWED"),
    ("{root}/../etc", "PATH_NOT_ALLOWED"),
    ("file:///etc/passwd", "PATH_NOT_ALLOWED"),
    ("relative/data.csv", "PATH_NOT_ALLOWED"),
    ("http://169.254.169.254/", "ADDRESS_NOT_ALLOWED"),
    ("simplecache::s3://bucket/x", "ADDRESS_NOT_ALLOWED"),
    ("{root}/out/passwd", "PATH_NOT_ALLOWED"),
    ("{root}/fifo", "PATH_NOT_ALLOWED"),
    ("{root}/nothing", "PATH_NOT_ALLOWED"),
    ("{root}/a\0b", "PATH_NOT_ALLOWED"),
]


@pytest.mark.parametrize(("uri", "reason"), REFUSED_PATHS)
def test_a_path_outside_of_the_roots_is_refused_without_naming_them(tmp_path: Path, uri: str, reason: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to("/etc")
    os.mkfifo(root / "fifo")
    source = spec_pb2.DataSource(uri=uri.format(root=root))
    with pytest.raises(SpecError) as caught:
        resolve_source(source, small_specs.locations(root))
    assert (caught.value.reason, caught.value.field) == (reason, "spec.train_data.uri")
    if "{root}" not in uri:
        assert str(root) not in caught.value.message


def test_a_folder_with_a_link_out_of_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "x\n")
    (tmp_path / "b.txt").symlink_to("/etc/hostname")
    with pytest.raises(SpecError, match="link out of the folder"):
        resolve_source(spec_pb2.DataSource(uri=str(tmp_path)), small_specs.locations(tmp_path))


def test_a_folder_is_all_of_its_files_sorted_or_one_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.csv", "a.csv", "more/c.csv", "README.md"):
        write(tmp_path, name, "text,label\nx,1\n")
    source = spec_pb2.DataSource(dataset="projects/p/datasets/d")
    where = small_specs.locations(tmp_path, **{"projects/p/datasets/d": tmp_path})
    assert [file.name for file in resolve_source(source, where)] == ["a.csv", "b.csv", "more/c.csv"]
    source.path = "more/c.csv"
    assert [file.name for file in resolve_source(source, where)] == ["more/c.csv"]
    source.path = "c.csv"
    with pytest.raises(SpecError, match="there is no file"):
        resolve_source(source, where)
    source.path = "../x.csv"
    with pytest.raises(SpecError) as caught:
        resolve_source(source, where)
    assert (caught.value.reason, caught.value.field) == ("PATH_NOT_ALLOWED", "spec.train_data.path")


def test_a_data_set_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_source(spec_pb2.DataSource(dataset="projects/p/datasets/d"), small_specs.locations(tmp_path))
    assert caught.value.reason == "DATASET_NOT_FOUND"


def test_files_of_several_formats_need_a_choice(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "text\nx\n")
    write(tmp_path, "b.txt", "x\n")
    with pytest.raises(SpecError, match="several formats"):
        resolve_source(spec_pb2.DataSource(uri=str(tmp_path)), small_specs.locations(tmp_path))


REAL = [
    ("sst2", "train.tsv", {}, 6920, ("a stirring , funny and finally transporting", "1")),
    ("stsb", "stsb-en-dev.csv", {"columns": {"text": "column_1", "text_pair": "column_2"}}, 1500, ("A man", "5.0")),
    ("ag_news", "test.csv", {"columns": {"text": "column_3", "label": "column_1"}}, 7600, ("Unions representing", "3")),
    ("sms_spam", "sms.tsv", {"columns": {"text": "column_2", "label": "column_1"}}, 5574, ("Go until", "ham")),
]


@pytest.mark.parametrize("case", REAL, ids=[row[0] for row in REAL])
def test_real_files_are_read_whole(case: tuple[str, str, dict[str, Any], int, tuple[str, str]]) -> None:
    folder, name, source, number, (start, label) = case
    rows = read_source(small_specs.shared_data(folder) / name, **source)
    assert len(rows) == number
    assert rows[0].text.startswith(start)
    assert rows[0].label == label
