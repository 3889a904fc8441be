"""Parquet files: only what is mapped is decoded, and what they decode to is bounded."""

from __future__ import annotations

import io
import os
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.small_specs import read_source
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.parquet_pages import PageInvalid, read_pages


def _parquet(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def test_parquet_is_read(tmp_path: Path) -> None:
    rows = read_source(_parquet(tmp_path, text=["a", "b"], label=[1, 0]))
    assert [(row.line, row.text, row.label) for row in rows] == [(1, "a", 1), (2, "b", 0)]


def test_a_struct_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="struct"):
        read_source(_parquet(tmp_path, text=[{"a": 1}], label=[1]))


def test_records_that_were_not_requested_are_left_out(tmp_path: Path) -> None:
    (row,) = read_source(_parquet(tmp_path, meta=[{"a": 1}], text=["a"], label=[1]))
    assert (row.text, row.label) == ("a", 1)


def test_what_pandas_and_duckdb_write_is_read(tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a", "b"], pa.large_string()).dictionary_encode(),
        "label": pa.array(["1.5", None]).cast(pa.decimal128(9, 1)),
    }
    assert [(row.text, row.label) for row in read_source(_parquet(tmp_path, **columns))] == [("a", 1.5), ("b", None)]


def test_a_duplicate_column_in_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], [1], [2]], names=["text", "label", "label"]), path)
    with pytest.raises(DataError, match="duplicate column name: label"):
        read_source(path)


def test_a_list_of_numbers_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be text"):
        read_source(_parquet(tmp_path, text=[[1, 2]], label=[1]))


@pytest.mark.parametrize(
    "header",
    [b"\x25\x02\x15\x02\x25\x0e\x00", b"\x25\x02\x15\x02\x4c\x1c\x00\x00\x00", b"\x25\x02\x15\x02\x4c\x15\x01\x00\x00"],
    ids=["a number for a struct", "a struct for a number", "fewer than no values"],
)
def test_a_page_header_of_another_shape_is_not_one(header: bytes) -> None:
    with pytest.raises(PageInvalid):
        list(read_pages(io.BytesIO(header), 0, len(header)))


def test_a_damaged_page_is_refused(tmp_path: Path) -> None:
    path = _parquet(tmp_path, text=[f"text number {i}" for i in range(5000)], label=list(range(5000)))
    content = bytearray(path.read_bytes())
    content[200:2000] = os.urandom(1800)
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_source(path)


def test_a_parquet_bomb_is_refused_in_flat_memory(tmp_path: Path) -> None:
    text = "x" * 2**20
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": rows, "label": [1] * 5000}), tmp_path / "a.parquet", row_group_size=5000)
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match="decodes to more than"):
        read_source(tmp_path / "a.parquet")
    assert pa.total_allocated_bytes() - before < 64 * 2**20


def test_columns_that_are_not_requested_are_not_decoded(tmp_path: Path) -> None:
    others = {
        "far": pa.array([253402300800000 * 10] * 9, pa.timestamp("ms")),
        "deep": pa.array([[["a"]]] * 9),
        "map": pa.array([[("k", 1)]] * 9, pa.map_(pa.string(), pa.int32())),
        "raw": pa.array([b"\xff"] * 9),
        "span": pa.array([1] * 9, pa.duration("s")),
        "broken": pa.array([f"zzzzzz{i}" for i in range(9)]),
    }
    table = pa.table({"review": ["a b"] * 9, "label": [1] * 9, **others})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"zzzzzz0", b"\xff" * 7))
    for columns in ({}, {"text": "review"}):
        assert {(row.text, row.label) for row in read_source(path, columns=columns)} == {("a b", 1)}
    for name, words in (("far", "timestamp"), ("span", "duration"), ("broken", "damaged after row 0")):
        with pytest.raises(DataError, match=words):
            read_source(path, columns={"text": "review", "label": name})


def test_a_column_name_may_have_dots(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body.raw": ["a b"], "label": [["x", "y"]]}), tmp_path / "a.parquet")
    (row,) = read_source(tmp_path / "a.parquet", columns={"text": "body.raw"})
    assert (row.text, row.label) == ("a b", ["x", "y"])


def _repeated(value: Any, times: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def _one_list(values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


BOMBS: dict[str, tuple[Any, str]] = {
    "rows": (lambda: {"text": _repeated("x", 1_200_000), "label": _repeated(1, 1_200_000)}, "decodes to more than"),
    "a long list": (lambda: {"text": ["a"], "label": _one_list(_repeated(1, 3_000_000))}, "a list of 3,000,000 values"),
    "a long list of long texts": (
        lambda: {"text": ["a"], "label": _one_list(_repeated("y" * 2**20, 300))},
        "decodes to more than",
    ),
    "a long value": (lambda: {"text": ["x" * 2**25], "label": [1]}, "a value of 33,554,432 characters"),
    "a large page": (lambda: {"text": ["x" * 2**24] * 17, "label": [1] * 17}, "a page decodes to"),
}


@pytest.mark.parametrize(("columns", "words"), BOMBS.values(), ids=BOMBS)
def test_what_a_parquet_file_decodes_to_is_bound_by_its_pages(tmp_path: Path, columns: Any, words: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table(columns()),
        path,
        row_group_size=2**24,
        compression="zstd",
        use_dictionary="decodes to more" in words,
    )
    assert path.stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=words):
        read_source(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 2**10


def test_many_different_texts_in_parquet_are_read_in_time_with_their_number(tmp_path: Path) -> None:
    texts = pa.array([f"text number {i}" * 3 for i in range(100_000)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "label": _repeated("a", 100_000)}), path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert len(read_source(path)) == 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 3


CUT = ["the first half", "all but the end"]


@pytest.mark.parametrize("left", [0.5, 0.99], ids=CUT)
def test_a_parquet_file_cut_short_is_refused_with_the_next_step(tmp_path: Path, left: float) -> None:
    path = _parquet(tmp_path, text=[f"text {i}" for i in range(2000)], label=[1] * 2000)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(DataError, match="its footer is missing; copy it again"):
        read_source(path)


def test_an_encrypted_parquet_file_is_refused(tmp_path: Path) -> None:
    path = _parquet(tmp_path, text=["a"], label=[1])
    content = path.read_bytes()
    path.write_bytes(b"PARE" + content[4:-4] + b"PARE")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_source(path)
