"""Pairs of texts in the forms that people have: records of languages, columns, and aligned text files."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from helpers.small_specs import locations, shared_data
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError, SpecError
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.data.text_pair_rows import PairNames, TextPair, read_pairs
from shardyard_trainer.tasks.summarization import NAMES
from shardyard_trainer.tasks.translation import names_of

ENGLISH = names_of(spec_pb2.Translation(source_language="en", target_language="de"))
WANTED = [("a dog", "ein Hund"), ("two cats", "zwei Katzen")]
TEXT = spec_pb2.DATA_FORMAT_TEXT


def pairs_of(
    folder: Path, source: spec_pb2.DataSource, names: PairNames = ENGLISH, bad: BadRows | None = None
) -> list[TextPair]:
    source.uri = source.uri or str(folder)
    files = resolve_source(source, locations(folder))
    return list(read_pairs(files, source, names, field="spec.train_data", bad=bad))


def texts(pairs: list[TextPair]) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in pairs]


def lines(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_of(cells: list[str]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows([["translation"], *([cell] for cell in cells)])
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.jsonl", lines([{"translation": {"en": s, "de": t, "fr": "…"}} for s, t in WANTED]), {}),
        ("a.json", json.dumps([{"id": 1, "pair": {"de": t, "en": s}} for s, t in WANTED]), {"translation": "pair"}),
        ("a.jsonl", lines([{"source": s, "target": t} for s, t in WANTED]), {}),
        ("a.jsonl", lines([{"de": t, "en": s, "fr": "x"} for s, t in WANTED]), {}),
        ("a.jsonl", lines([{"de-AT": t, "en": s, "fr": "x"} for s, t in WANTED]), {}),
        ("a.csv", "en,de_DE\na dog,ein Hund\ntwo cats,zwei Katzen\n", {}),
        ("a.csv", "EN,DE\na dog,ein Hund\ntwo cats,zwei Katzen\n", {}),
        ("a.tsv", "src\ttgt\na dog\tein Hund\ntwo cats\tzwei Katzen\n", {}),
        (
            "a.tsv",
            "a dog\tein Hund\tCC-BY\ntwo cats\tzwei Katzen\tCC-BY\n",
            {"source": "column_1", "target": "column_2"},
        ),
        (
            "a.jsonl",
            lines([{"source": s.split(), "target": [t]} for s, t in WANTED]),
            {},
        ),  # As pandas and as other tools write a record into a cell.
        ("a.csv", csv_of([str({"en": s, "de": t}) for s, t in WANTED]), {}),
        ("a.csv", csv_of([json.dumps({"en": s, "de": t}) for s, t in WANTED]), {}),
    ],
)
def test_tables_have_pairs(name: str, content: str, columns: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert texts(pairs_of(tmp_path, spec_pb2.DataSource(columns=columns))) == WANTED


def test_two_regions_of_a_language_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"en": "a dog", "de-AT": "ein Hund", "de-DE": "ein Hund"}]))
    with pytest.raises(DataError, match="the columns de-AT, de-DE may each be the target; map one in columns"):
        pairs_of(tmp_path, spec_pb2.DataSource())


def test_a_message_names_the_column_of_a_side(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"en": "a dog", "de": 7}]))
    with pytest.raises(DataError, match=r"the target is 7, which is not a text.* \(the target is the column 'de'\)"):
        pairs_of(tmp_path, spec_pb2.DataSource())


def test_parquet_has_records_of_languages(tmp_path: Path) -> None:
    rows = [{"translation": {"en": s, "de": t}} for s, t in WANTED]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert texts(pairs_of(tmp_path, spec_pb2.DataSource())) == WANTED


@pytest.mark.parametrize(
    "row",
    [
        {"EN": "a dog", "De": "ein Hund"},
        {"en_XX": "a dog", "de-AT": "ein Hund", "fr_XX": "un chien"},
        {"en": "a dog", "en_GB": "another", "de": "ein Hund"},
        {"language": ["de", "en"], "translation": ["ein Hund", "a dog"]},
    ],
)
def test_a_record_has_its_languages_in_any_case_with_a_region_or_as_two_lists(row: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"translation": row}]))
    assert texts(pairs_of(tmp_path, spec_pb2.DataSource())) == [("a dog", "ein Hund")]


def test_a_language_with_several_regions_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"translation": {"en_GB": "a", "en_US": "b", "de": "c"}}]))
    with pytest.raises(DataError, match="no text for source_language 'en'; there are: en_GB, en_US, de"):
        pairs_of(tmp_path, spec_pb2.DataSource())


@pytest.mark.parametrize("columns", [("inputs", "targets"), ("src", "ref"), ("input_text", "target_text")])
def test_translations_are_found_by_the_names_of_public_sets(columns: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([dict(zip(columns, WANTED[0], strict=True))]))
    assert texts(pairs_of(tmp_path, spec_pb2.DataSource())) == WANTED[:1]


def test_the_hint_about_a_header_is_true_for_every_task(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("English\tGerman\na dog\tein Hund\n")
    with pytest.raises(DataError, match="as none of its names is mapped or one that the task looks for"):
        pairs_of(tmp_path, spec_pb2.DataSource())


def test_summaries_are_found_by_the_names_of_public_sets(tmp_path: Path) -> None:
    for columns in (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "headline"),
                    ("documents", "tldr"), ("article_text", "abstract_text"), ("inputs", "targets")):  # fmt: skip
        row = dict(zip(columns, ("a long one", "short"), strict=True))
        (tmp_path / "a.jsonl").write_text(lines([{"id": 7, **row}]))
        assert texts(pairs_of(tmp_path, spec_pb2.DataSource(), NAMES)) == [("a long one", "short")]


@pytest.mark.parametrize(
    "names",
    [
        ("train.en", "train.de"),
        ("train.en", "train.de-AT.txt"),
        ("train.en.gz", "train.de.txt"),
        ("a.source", "a.target"),
    ],
)
def test_text_files_of_one_name_are_aligned(names: tuple[str, str], tmp_path: Path) -> None:
    for name, side in zip(names, (0, 1), strict=True):
        content = "".join(pair[side] + "\n" for pair in WANTED).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "train.fr").write_text("un chien\n")
    assert texts(pairs_of(tmp_path, spec_pb2.DataSource(format=TEXT))) == WANTED


@pytest.mark.parametrize(("side", "role"), [("en", "sources"), ("de", "targets")])
def test_a_file_beside_its_packed_form_is_refused_unless_one_is_named(side: str, role: str, tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("a dog\n")
    (tmp_path / "a.de").write_text("ein Hund\n")
    (tmp_path / f"a.{side}.gz").write_bytes(gzip.compress(b"other\n"))
    with pytest.raises(DataError, match=f"'a.{side}' and 'a.{side}.gz' may both be the {role} of 'a'; leave one out"):
        pairs_of(tmp_path, spec_pb2.DataSource(format=TEXT))
    named = spec_pb2.DataSource(format=TEXT, columns={"source": "a.en", "target": "a.de"})
    assert texts(pairs_of(tmp_path, named)) == [("a dog", "ein Hund")]


def test_text_files_are_named_as_source_and_target(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (tmp_path / f"{part}.en.txt").write_text(f"{part} dog\n")
        (tmp_path / f"{part}.de.txt").write_text(f"{part} Hund\n")
    source = spec_pb2.DataSource(columns={"source": "valid.de.txt", "target": "valid.en.txt"})
    assert texts(pairs_of(tmp_path, source)) == [("valid Hund", "valid dog")]
    assert texts(pairs_of(tmp_path, spec_pb2.DataSource())) == [
        ("train dog", "train Hund"),
        ("valid dog", "valid Hund"),
    ]


@pytest.mark.parametrize(
    ("files", "columns", "message"),
    [
        ({"a.en": "x\ny\nz\n", "a.de": "u\nv\n"}, {}, "a.en: 3 lines, but a.de has 2"),
        ({"a.en": "x\n", "a.de": "u\n\nw"}, {}, "a.en: 1 lines, but a.de has 3"),
        ({"a.en": "x\ny\n"}, {}, "'a.en' has no partner"),
        (
            {"a.txt": "x\n"},
            {},
            "the texts have no targets (a.txt); give two files of one name that end in `.en` and `.de`",
        ),
        ({"a.en": "x\n", "a.de": "u\n"}, {"source": "a.en"}, "no file is named as target"),
        ({"a.en": "x\n", "a.de": "u\n"}, {"source": "a.en", "target": "a.dr"}, "there is no file 'a.dr'"),
        ({"a.en": "x\ny\n", "a.de": "u\n \n"}, {}, "a.de, line 2: the target is empty"),
        ({"a.en": "x\n", "a.de": "u\n", "a.en.txt": "y\n"}, {}, "'a.en' and 'a.en.txt' may both be the sources of 'a'"),
        (
            {"a.en": "x\n", "a.de": "u\n", "a.de.text": "y\n"},
            {},
            "'a.de' and 'a.de.text' may both be the targets of 'a'",
        ),
        (
            {"a.en": "x\n", "a.source": "y\n", "a.de": "u\n"},
            {},
            "'a.en' and 'a.source' may both be the sources of 'a'; leave one out, or name two files in columns",
        ),
    ],
)
def test_text_files_that_do_not_belong_together_are_refused(
    files: dict[str, str], columns: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        pairs_of(tmp_path, spec_pb2.DataSource(format=TEXT, columns=columns))
    assert message in caught.value.message
    assert caught.value.field.startswith("spec.train_data")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"translation": {"en": "a", "fr": "b"}}, "no text for target_language 'de'; there are: en, fr"),
        ({"translation": {"en": "a", "de": " "}}, "the target is empty; fill it in"),
        ({"translation": {"en": "", "de": "b"}}, "the source is empty; fill it in"),
        ({"translation": {"en": "a", "de": None}}, "the target is missing"),
        (
            {"translation": "a ||| b"},
            "`translation` is 'a ||| b', which is not a record with a text for each language; "
            'write it as {"en": "…", "de": "…"}, or give the texts in two columns',
        ),
        ({"translation": "{'en': 'a', 'de'"}, "write it as {"),
        ({"translation": "['a', 'b']"}, "is \"['a', 'b']\", which is not a record"),
        ({"translation": "{'en': 'a', 'fr': 'b'}"}, "no text for target_language 'de'; there are: en, fr"),
        ({"source": "a", "target": 7}, "the target is 7, which is not a text"),
        ({"source": "a", "target": ["b", "c"]}, "the target is a list of 2 texts"),
        ({"source": "a", "target": "b\0"}, "NUL"),
        ({"source": "a", "target": "b\ud800"}, "half of a surrogate pair"),
        ({"text": "a", "label": "b"}, "no columns `source` and `target` or `translation`; there are: text, label"),
        ({"source": "a", "src": "b", "tgt": "c", "trg": "d"}, "may each be the target"),
    ],
)
def test_a_row_that_is_not_a_pair_is_refused_with_its_line(row: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([row]))
    with pytest.raises(SpecError) as caught:
        pairs_of(tmp_path, spec_pb2.DataSource())
    assert message in caught.value.message and "a.jsonl" in caught.value.message


def test_languages_that_are_not_said_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"translation": {"en": "a", "ro": "b"}}]))
    with pytest.raises(DataError, match="set source_language; there are: en, ro"):
        pairs_of(tmp_path, spec_pb2.DataSource(), names_of(spec_pb2.Translation()))


def test_bad_rows_are_left_out_up_to_their_share_and_keep_files_aligned(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"one\ntw\xff\nthree\nfour\n")
    (tmp_path / "a.de").write_bytes(b"eins\nzwei\ndrei\n\n")
    source = spec_pb2.DataSource(format=TEXT, max_bad_rows_share=0.5)
    bad = BadRows(source)
    assert texts(pairs_of(tmp_path, source, bad=bad)) == [("one", "eins"), ("three", "drei")]
    bad.finish(2, "spec.train_data")
    assert "2 of 4 rows cannot be used" in bad.note(2)
    source.max_bad_rows_share = 0.3
    with pytest.raises(DataError, match="2 of 4 rows cannot be used"):
        pairs_of(tmp_path, source)


def test_a_prefix_of_its_own_that_no_source_has_is_named(tmp_path: Path) -> None:
    rows = [{"prefix": "shorten", "input_text": s, "target_text": t} for s, t in WANTED]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    source = spec_pb2.DataSource()
    bad = BadRows(source)
    assert texts(pairs_of(tmp_path, source, bad=bad)) == WANTED
    assert bad.unread().startswith("not read: column 'prefix' (2 rows); map a column that matters")


def test_real_sets_are_read_as_they_are() -> None:
    folder = shared_data("multi30k")
    for part, number in (("val", 1014), ("test_2016_flickr", 1000)):
        source = spec_pb2.DataSource(
            uri=str(folder), format=TEXT, columns={"source": f"{part}.en.gz", "target": f"{part}.de.gz"}
        )
        assert len(pairs_of(folder, source)) == number
    folder = shared_data("scitldr_a")
    source = spec_pb2.DataSource(uri=str(folder), path="train.jsonl")
    assert len(pairs_of(folder, source, NAMES)) == 1992
    folder = shared_data("hf_tests_samples")
    romanian = names_of(spec_pb2.Translation(source_language="en", target_language="ro"))
    for path in ("wmt16/sample.json", "wmt_en_ro/train.json"):
        assert pairs_of(folder, spec_pb2.DataSource(uri=str(folder), path=path), romanian)
    assert pairs_of(folder, spec_pb2.DataSource(uri=str(folder), path="xsum/sample.json"), NAMES)
