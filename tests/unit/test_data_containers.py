"""Files that are not what their names say: packed ones are read, others are named with the next step."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import resource
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from google.protobuf import json_format
from pyarrow import feather

from helpers import small_specs
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.columns import Row, read_rows
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.data.sources import resolve_source

CSV = "text,label\nfine film,1\nbad film,0\n"
ROWS = [{"text": "fine film", "label": 1}, {"text": "bad film", "label": 0}]


def read(path: Path, content: bytes, **source: Any) -> list[Row]:
    path.write_bytes(content)
    message = json_format.ParseDict({"uri": str(path), **source}, spec_pb2.DataSource())
    files = resolve_source(message, small_specs.locations(path.parent))
    return list(read_rows(files, message, with_label=True))


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, CSV)
    return stream.getvalue()


def arrow(folder: Path) -> bytes:
    feather.write_feather(pa.table({"text": ["a"]}), str(folder / "made"))
    return (folder / "made").read_bytes()


def arrow_stream() -> bytes:
    stream = io.BytesIO()
    table = pa.table({"text": ["a"]})
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def sqlite(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "made.db")
    connection.execute("create table rows (text)")
    connection.close()
    return (folder / "made.db").read_bytes()


READ = {
    "CSV in gzip": ("a.csv.gz", gzip.compress(CSV.encode())),
    "gzip without its ending": ("a.csv", gzip.compress(CSV.encode())),
    "gzip in two parts": ("a.csv.gz", gzip.compress(CSV[:22].encode()) + gzip.compress(CSV[22:].encode())),
    "TSV in gzip": ("a.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode())),
    "JSONL in gzip": ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "array": ("a.json", json.dumps(ROWS).encode()),
    "array over lines, with a mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=4).encode()),
    "array called JSONL, in gzip": ("a.jsonl.gz", gzip.compress(json.dumps(ROWS, indent=1).encode())),
    "array in CRLF": ("a.json", json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode()),
    "objects called .json": ("a.json", "\n".join(map(json.dumps, ROWS)).encode()),
    "the same, quoted": ("a.csv", b'"SEP=;"\r\ntext;label\r\nfine film;1\r\nbad film;0\r\n'),
    "Excel's first line": ("a.csv", b"\xef\xbb\xbfsep=;\r\ntext;label\r\nfine film;1\r\nbad film;0\r\n"),
}


@pytest.mark.parametrize(("name", "content"), READ.values(), ids=READ)
def test_a_packed_file_or_an_array_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    assert [(row.text, str(row.label)) for row in read(tmp_path / name, content)] == [
        ("fine film", "1"),
        ("bad film", "0"),
    ]


def test_lines_are_counted_in_what_a_packed_file_or_an_array_holds(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.json", json.dumps(ROWS, indent=1).encode())
    assert [row.line for row in rows] == [2, 6]
    with pytest.raises(SpecError, match=r"a\.csv\.gz, line 3: 3 values"):
        read(tmp_path / "a.csv.gz", gzip.compress(b"text,label\na,1\nb,c,0\n"))


def refusals(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    packed = gzip.compress(json.dumps([{"text": str(i**3), "label": i % 2} for i in range(5000)]).encode())
    array = json.dumps(ROWS, indent=1)
    return {
        "zip": ("a.zip", zipped("a.csv"), "is a zip archive; unpack it"),
        "zip called CSV": ("a.csv", zipped("a.csv"), "is a zip archive; unpack it"),
        "workbook": ("a.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"), "save its sheet as CSV"),
        "old workbook": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "(such as .xls); save its sheet"),
        "bzip2": ("a.csv.bz2", bz2.compress(CSV.encode()), "a bzip2 file; unpack it"),
        "xz": ("a.csv", lzma.compress(CSV.encode()), "an xz file; unpack it"),
        "zstd": ("a.csv", b"\x28\xb5\x2f\xfd" + bytes(20), "a Zstandard file; unpack it"),
        "pickle": ("a.csv", pickle.dumps(ROWS), "a Python pickle; pickles are never opened"),
        "SQLite": ("a.db", sqlite(folder), "a SQLite database; save the query's rows"),
        "Feather": ("a.parquet", arrow(folder), "an Arrow (Feather) file; save it as Parquet"),
        "Arrow stream": ("data.arrow", arrow_stream(), "an Arrow stream; save it as Parquet"),
        "UTF-16": ("a.csv", CSV.encode("utf-16"), "UTF-16 text; save it as UTF-8, as `iconv"),
        "UTF-16 without a mark": ("a.jsonl", json.dumps(ROWS[0]).encode("utf-16-le"), "(UTF-16LE); save it as UTF-8"),
        "UTF-16BE": ("a.csv", CSV.encode("utf-16-be"), "(UTF-16BE); save it as UTF-8"),
        "UTF-32": ("a.csv", CSV.encode("utf-32"), "UTF-32 text; save it as UTF-8"),
        "Windows": ("a.csv", CSV.replace("fine", "fïne").encode("cp1252"), "`iconv -f WINDOWS-1252 -t UTF-8`"),
        "tar": ("a.csv.gz", gzip.compress(bytes(257) + b"ustar" + bytes(250)), "a tar archive inside gzip; unpack"),
        "gzip twice": ("a.csv.gz", gzip.compress(gzip.compress(CSV.encode())), "a gzip file inside gzip; unpack it"),
        "gzip cut": ("a.json.gz", packed[:-2000], "cut short"),
        "gzip cut early": ("a.json.gz", packed[:100], "the gzip file is cut short; copy it again"),
        "gzip damaged": ("a.json.gz", packed[:2000] + b"xxxxxxxx" + packed[2008:], "is damaged"),
        "gzip and more": ("a.csv.gz", gzip.compress(CSV.encode()) + b"more", "other data after its compressed data"),
        "LFS": ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "`git lfs pull`"),
        "web page": ("a.csv", b"\n<!DOCTYPE html>\n<html>", "a web page or XML; a download may have failed"),
        "Parquet called CSV": ("a.csv", b"PAR1" + bytes(20), "a Parquet file; give format PARQUET"),
        "CSV called Parquet": ("a.parquet", CSV.encode(), "is it text? give the format, such as CSV"),
        "Parquet in gzip": ("a.parquet", gzip.compress(b"PAR1"), "give the .parquet file"),
        "array cut": ("a.json", array[:-10].encode(), "if it was cut short, copy it again"),
        "array cut behind an object": ("a.json", array[:-2].encode(), "if the file was cut short, copy it again"),
        "array with a comma too many": ("a.json", array[:-2].encode() + b",]", "there is a comma before"),
        "array without commas": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2: the list continues with '{'"),
        "array of numbers": ("a.json", b"[1, 2]", "each element of the list must be an object"),
        "array and more": ("a.json", array.encode() + b"\n{}", "something follows the list's `]`"),
        "array with a slip": ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: not JSON: Expecting ':' delimiter"),
        "array not UTF-8": ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "line 2: byte 27 of the file (0xff)"),
        "deep array": ("a.json", b'[{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}]", "nested deeper than 64"),
        "wrapped": ("a.json", json.dumps({"data": ROWS}).encode(), "key 'data' holds a list of rows; save that list"),
        "of pandas": ("a.json", b'{"text": {"0": "a"}, "label": {"0": 1}}', "orient='records'"),
        "objects over lines": ("a.json", json.dumps(ROWS[0], indent=1).encode(), "line 1: not JSON"),
        "two objects a line": ("a.jsonl", b'{"text": "a"}{"text": "b"}', "each object on a line of its own"),
        "of Python": ("a.jsonl", b"{'text': 'a'}", "write it with json.dumps"),
        "CR alone in TSV": ("a.tsv", b"text\tlabel\ra\t1\r", "lines end with a lone CR"),
        "odd quotes": ("a.csv", "text,label\n“a, b”,1\n".encode(), "not quotes to CSV"),
        "backslashes": ("a.csv", b'text,label\n"a \\"b\\"",1\n', "CSV doubles it"),
        "a space behind a quote": ("a.csv", b'text,label\n"a, b" ,1\n', "a space follows a closing quote; remove it"),
        "delimiter at the end": ("a.csv", b"text,label\na,1,\n", "the row ends with a delimiter: remove it"),
        "late quote after a space": (
            "a.csv",
            b"text,label\n" + b"a,1\n" * 300 + b'b, "1"\n',
            "line 302: a quote after a space",
        ),
    }


def test_what_is_not_read_is_named_with_the_next_step(tmp_path: Path) -> None:
    for title, (name, content, words) in refusals(tmp_path).items():
        with pytest.raises(SpecError) as caught:
            read(tmp_path / name, content)
        assert words in caught.value.message, (title, caught.value.message)
        assert name in caught.value.message and caught.value.reason == "DATA_INVALID", title
        assert caught.value.field == "spec.train_data", title


def test_a_space_before_quotes_is_not_part_of_the_value(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", b'text, label\n"a, b", "pos"\n"c", "neg, too"\n')
    assert [(row.text, row.label) for row in rows] == [("a, b", "pos"), ("c", "neg, too")]
    # Such a thing inside a value, and spaces without quotes, stay as they are.
    rows = read(tmp_path / "b.csv", b'text,label\n" ""x"", ""y""",1\n"a, ""b""",0\n c,1\n')
    assert [row.text for row in rows] == [' "x", "y"', 'a, "b"', " c"]


def test_a_long_quoted_value_is_read_and_one_too_long_is_said_so(tmp_path: Path) -> None:
    long = "a line of it\n" * 100_000
    assert read(tmp_path / "a.csv", f'text,label\n"{long}",1\nb,0\n'.encode())[0].text == long
    with pytest.raises(SpecError, match="line 2: a value that begins here is longer than 16 MiB"):
        read(tmp_path / "a.csv", f'text,label\n"{long * 14}",1\nb,0\n'.encode())


@pytest.mark.parametrize(("line", "times"), [(b"\n", 1_200_000), (b"x" * 2**20 + b"\n", 300)])
def test_a_packed_bomb_is_refused_in_flat_memory(tmp_path: Path, line: bytes, times: int) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(100):
            stream.write(line * (times // 100))
    source = spec_pb2.DataSource(uri=str(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpecError, match="decodes to more than 268,435,456 bytes"):
        for _ in read_rows(resolve_source(source, small_specs.locations(tmp_path)), source, with_label=False):
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10


COSTLY = {
    "keys": ("{" + ",".join(f'"k{i}": 1' for i in range(40_000)) + ', "k7": 1}', "duplicate key 'k7'"),
    "twice each": ("{" + ",".join(f'"k{i // 2}": 1' for i in range(40_000)) + "}", "duplicate key 'k0'"),
    "values": ('{"text": "x", "label": [' + "[]," * 1_500_000 + "[]]}", "values in one row; at most 1,000,000"),
    "brackets": ('{"text": ' + "[" * 2_000_000, "nested deeper than 64"),
    "escaped quotes": ('{"text": [{{{{' + "[" * 64 + '"' + '\\"' * 2_000_000, "nested deeper than 64"),
}


@pytest.mark.parametrize(("line", "words"), COSTLY.values(), ids=COSTLY)
def test_a_row_costs_no_more_than_its_size(tmp_path: Path, line: str, words: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(SpecError, match=words):
        read(tmp_path / "a.jsonl", line.encode())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 2


def test_a_large_array_on_one_line_is_read_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as stream:
        stream.write("[")
        for number in range(40_000):
            stream.write(f'{"," * (number > 0)}{{"text": "{"word " * 200}", "label": {number % 2}}}')
        stream.write("]")
    source = spec_pb2.DataSource(uri=str(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = read_rows(resolve_source(source, small_specs.locations(tmp_path)), source, with_label=True)
    assert sum(row.label for row in rows) == 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 2**10


def test_json_beside_data_files_is_about_them_and_alone_it_is_the_data(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text(json.dumps(ROWS))
    assert [file.name for file in files_in(tmp_path)] == ["info.json"]
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    assert [file.name for file in files_in(tmp_path)] == ["a.csv.gz"]


def files_in(folder: Path) -> Any:
    return resolve_source(spec_pb2.DataSource(uri=str(folder)), small_specs.locations(folder))
