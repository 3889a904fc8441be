"""Tagged words as tools and libraries write them: each layout gives the same words and tags, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.tagged import LABELS
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.tagged_rows import read_tagged
from shardyard_trainer.data.tags import SchemeFinder, to_bio
from shardyard_trainer.data.word_split import split_words

TEXTS = [
    (["Anna", "met", "Bob", "Smith", "."], ["B-PER", "O", "B-PER", "I-PER", "O"]),
    (["Rome", "is", "far"], ["B-LOC", "O", "O"]),
]
SPANS = [("Anna met Bob Smith.", [(0, 4, "PER"), (9, 18, "PER")]), ("Rome is far", [(0, 4, "LOC")])]
NUMBERS = [[LABELS.index(tag) for tag in tags] for _, tags in TEXTS]


def conll(line: str = "{word} {tag}", *, before: str = "", head: str = "") -> str:
    texts = (
        "\n".join(line.format(word=word, tag=tag, n=at + 1) for at, (word, tag) in enumerate(zip(*text, strict=True)))
        for text in TEXTS
    )
    return head + "\n".join(f"{before}{text}\n" for text in texts)


def one_a_row(header: str, line: str) -> str:
    rows = [
        line.format(text=text if at == 0 or "{text}" in line else "", word=word, tag=tag, first=first)
        for text, pair in enumerate(TEXTS)
        for at, (word, tag) in enumerate(zip(*pair, strict=True))
        for first in [f"Sentence: {text + 1}" if at == 0 else ""]
    ]
    return "\n".join([header, *rows]) + "\n"


def objects(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def spanned(key: str, starts: str = "start", ends: str = "end", label: str = "label", **more: Any) -> str:
    return objects(
        *(
            {"text": text, key: [{starts: first, ends: last, label: kind, **more} for first, last, kind in spans]}
            for text, spans in SPANS
        )
    )


def quoted(rows: list[tuple[str, str]]) -> str:
    return "tokens,tags\n" + "".join('"{}","{}"\n'.format(*(each.replace('"', '""') for each in row)) for row in rows)


LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a tab at the end": (".conll", conll("{word}\t{tag}\t"), {}),
    "spaces at the end": (".conll", conll("{word} {tag}  "), {}),
    "CRLF and a mark": (".conll", "\ufeff" + conll().replace("\n", "\r\n"), {}),
    "documents": (".conll", conll("{word} NNP I-NP {tag}", head="-DOCSTART- -X- -X- O\n\n"), {}),
    "ids": (".conll", conll("{word} _ _ {tag}", before="# id 5a2b domain=en\n"), {}),
    "sentence ids": (".conll", conll("{word} _ _ {tag}", before="# sent_id = 3\n# text = x\n"), {}),
    "a document of two columns": (".conll", conll(head="# newdoc\n"), {}),
    "counted words": (".conll", conll("{n} {word} NN {tag}"), {}),
    "nested entities": (
        ".conll",
        conll("{n}\t{word}\t{tag}\tO", before="#\thttp://x [2009-10-17]\n"),
        {"columns": {"tags": "column_3"}},
    ),
    "CoNLL-U": (
        ".conll",
        conll("{n}\t{word}\t_\t{tag}" + "\t_" * 6).replace("1\tRome", "1-2\tRomeis" + "\t_" * 8 + "\n1\tRome"),
        {"columns": {"tags": "column_4"}},
    ),
    "CoNLL in a .txt": (".txt", conll(), {"format": spec_pb2.DATA_FORMAT_CONLL}),
    "small marks": (".conll", conll().replace("B-", "b-").replace("I-", "i-"), {}),
    "JSON in CSV": (".csv", quoted([(json.dumps(words), json.dumps(tags)) for words, tags in TEXTS]), {}),
    "Python in CSV": (".csv", quoted([(str(words), str(tags)) for words, tags in TEXTS]), {}),
    "NumPy in CSV": (
        ".csv",
        quoted([(str(words).replace(",", ""), str(tags).replace(",", "")) for words, tags in TEXTS]),
        {},
    ),
    "NumPy's numbers in CSV": (
        ".csv",
        quoted([(" ".join(words), str(n).replace(",", "")) for (words, _), n in zip(TEXTS, NUMBERS, strict=True)]),
        {"names": LABELS},
    ),
    "rows of a word": (".csv", one_a_row("sentence_id,words,labels", "{text},{word},{tag}"), {}),
    "rows of a word, ids once": (".csv", one_a_row("Sentence #,Word,POS,Tag", "{first},{word},NN,{tag}"), {}),
    "words and ner": (".jsonl", objects(*({"words": words, "ner": tags} for words, tags in TEXTS)), {}),
    "numbers as floats": (
        ".jsonl",
        objects(*({"tokens": t[0], "tags": [float(k) for k in n]} for t, n in zip(TEXTS, NUMBERS, strict=True))),
        {"names": LABELS},
    ),
    "numbers as text": (
        ".jsonl",
        objects(*({"tokens": t[0], "tags": [str(k) for k in n]} for t, n in zip(TEXTS, NUMBERS, strict=True))),
        {"names": LABELS},
    ),
    "doccano": (".jsonl", objects(*({"text": text, "label": spans} for text, spans in SPANS)), {}),
    "doccano, newer": (".jsonl", objects(*({"text": text, "labels": spans} for text, spans in SPANS)), {}),
    "doccano with relations": (".jsonl", spanned("entities", "start_offset", "end_offset", id=1), {}),
    "doccano with texts": (
        ".jsonl",
        objects(
            *({"text": text, "label": [[*span, text[slice(*span[:2])]] for span in spans]} for text, spans in SPANS)
        ),
        {},
    ),
    "Rasa": (".jsonl", spanned("entities", label="entity", value="x"), {}),
    "Label Studio": (".jsonl", spanned("label", label="labels").replace('"PER"', '["PER"]'), {}),
    "spans marked twice": (".jsonl", objects(*({"text": text, "spans": spans * 2} for text, spans in SPANS)), {}),
    "columns of spans": (
        ".jsonl",
        objects(
            *(
                {"text": text, "spans": dict(zip(("start", "end", "label"), zip(*spans, strict=True), strict=True))}
                for text, spans in SPANS
            )
        ),
        {},
    ),
}  # fmt: skip


def read(path: Path, options: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    source = spec_pb2.DataSource(columns=options.get("columns"))
    endings = {
        ".conll": spec_pb2.DATA_FORMAT_CONLL,
        ".csv": spec_pb2.DATA_FORMAT_CSV,
        ".jsonl": spec_pb2.DATA_FORMAT_JSONL,
        ".parquet": spec_pb2.DATA_FORMAT_PARQUET,
    }
    format_ = options.get("format") or endings[path.suffix]
    finder = SchemeFinder()
    texts = list(read_tagged([DataFile(path, path.name, format_)], source, names=options.get("names", ()), field="f"))
    for text in texts:
        finder.add(text.tags, text.file, text.line)
    scheme = finder.find()
    return [(text.words, to_bio(text.tags, scheme)) for text in texts]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read_as_the_same_words_and_tags(name: str, tmp_path: Path) -> None:
    ending, content, options = LAYOUTS[name]
    path = tmp_path / f"a{ending}"
    path.write_bytes(content.encode())
    assert read(path, options) == TEXTS


def test_words_that_begin_with_a_hash_are_words(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("#id B-TAG\n#love O\n\n# O\n#text O\n")
    assert read(path, {}) == [(["#id", "#love"], ["B-TAG", "O"]), (["#", "#text"], ["O", "O"])]


def test_parquet_has_records_and_the_names_of_numbers(tmp_path: Path) -> None:
    names = {"feature": {"names": LABELS, "_type": "ClassLabel"}, "_type": "Sequence"}
    about = json.dumps({"info": {"features": {"ner_tags": names, "tokens": {"_type": "Sequence"}}}})
    table = pa.table({"tokens": [words for words, _ in TEXTS], "ner_tags": NUMBERS})
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "names.parquet")
    assert read(tmp_path / "names.parquet", {}) == TEXTS
    # The file's own names say what its numbers are, whatever order a spec has.
    assert read(tmp_path / "names.parquet", {"names": LABELS[::-1]}) == TEXTS
    spans = [[{"start": a, "end": b, "label": kind} for a, b, kind in spans] for _, spans in SPANS]
    texts = [text for text, _ in SPANS]
    pq.write_table(pa.table({"text": texts, "spans": spans}), tmp_path / "records.parquet")
    assert read(tmp_path / "records.parquet", {}) == TEXTS
    lists = [{key: [span[key] for span in each] for key in each[0]} for each in spans]
    pq.write_table(pa.table({"text": texts, "spans": lists}), tmp_path / "lists.parquet")
    assert read(tmp_path / "lists.parquet", {}) == TEXTS


@pytest.mark.parametrize(
    "about", [b"{", b'{"info": 3}', b'{"info": {"features": {"ner_tags": [[[]]]}}}', b"[" * 99_999]
)
def test_what_a_parquet_file_says_of_itself_is_not_trusted(about: bytes, tmp_path: Path) -> None:
    table = pa.table({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]})
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", {"names": LABELS}) == [(["a", "b"], ["O", "B-LOC"])]


GOOD = {"tokens": ["x", "Rome"], "tags": ["O", "B-LOC"]}
GOOD_SPANS = {"text": "in Rome", "spans": [[3, 7, "LOC"]]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no word": ({"tokens": ["a", None], "tags": ["O", "O"]}, "token 2 is missing"),
    "a record for a word": ({"tokens": [{"text": "a"}], "tags": ["O"]}, "token 1 is"),
    "no tag": ({"tokens": ["a"], "tags": [None]}, "tag 1 is missing"),
    "an empty tag": ({"tokens": ["a"], "tags": [""]}, "write O for a word outside entities"),
    "a tag without its mark": ({"tokens": ["a"], "tags": ["LOC"]}, "it has no B- or I-"),
    "a small o": ({"tokens": ["a"], "tags": ["o"]}, "write O outside of them"),
    "a control character": ({"tokens": ["a"], "tags": ["B-\u001b[31m"]}, "control character"),
    "a tokenizer's tags": ({"tokens": ["a"], "tags": [-100]}, "say which tags they are"),
    "bytes instead of characters": ({"text": "Zoë é met Anna", "spans": [[12, 16, "PER"]]}, "characters"),
    "the last character as the end": ({"text": "see Anna now", "spans": [[4, 7, "PER"]]}, "'Anna' (4 to 8)"),
    "a part of a word": ({"text": "Berlins Wetter", "spans": [[0, 6, "LOC"]]}, "ends inside the word 'Berlins'"),
    "a span that says another text": (
        {"text": "met Anna", "spans": [{"start": 0, "end": 3, "label": "PER", "text": "Anna"}]},
        "the text has 'met' from 0 to 3",
    ),
    "a mark in a span": ({"text": "see Anna", "spans": [[4, 8, "B-PER"]]}, "name the kind alone"),
    "a number for a label": (
        {"text": "EU rejects", "spans": [{"label": 7, "start_offset": 0, "end_offset": 2}]},
        "label is a number; export the names",
    ),
    "no spans": ({"text": "see Anna", "spans": None}, "spans is missing"),
    "brackets": ({"text": "see Anna", "spans": "[" * 100_000}, "give a list"),
    "signs": ({"text": "see Anna", "spans": "[" + "-" * 300_000 + "1]"}, "give a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_not_tagged_words_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    row, message = REFUSED[name]
    path = tmp_path / "a.jsonl"
    path.write_text(objects(*[GOOD_SPANS if "text" in row else GOOD] * 6, row))
    with pytest.raises(DataError, match=r"a\.jsonl, line 7") as caught:
        read(path, {})
    assert message in str(caught.value)


FILES = {
    "tags behind their kind": (".jsonl", objects({"tokens": ["a"], "tags": ["PER-B"]}), "write B-PER and I-PER"),
    "texts in turns": (
        ".csv",
        "sentence_id,words,labels\n0,Anna,B-PER\n0,met,O\n1,with,O\n0,Bob,B-PER\n",
        "line 5: text_id '0' appears again",
    ),
    "a word a row": (".csv", "tokens,tags\nAnna,B-PER\nmet,O\n", "columns.text_id"),
    "CoNLL in a .txt": (".txt", conll(), "set format to conll"),
    "a line of other columns": (".conll", conll() + "Rome is B-LOC\n", "line 10: 3 columns"),
    "only remarks": (".conll", "# sent_id = 1\n# text = a\n", "empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_tagged_words_is_refused_with_the_next_step(name: str, tmp_path: Path) -> None:
    ending, content, message = FILES[name]
    path = tmp_path / f"a{ending}"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read(path, {"format": spec_pb2.DATA_FORMAT_TEXT} if ending == ".txt" else {})
    assert message in str(caught.value)


WORDS = {
    "中国国家主席访问美国": "中 国 国 家 主 席 访 问 美 国",
    "डेरी मिल्क": "डेरी मिल्क",
    "Zoe\u0308 é": "Zoe\u0308 é",
    "a👍🏽b": "a 👍🏽 b",
    "می\u200cخواهم": "می\u200cخواهم",
    "10\u00a0000 €": "10 000 €",
    "co\u00adoperate": "co\u00adoperate",
    "\u200bRome\u200b": "Rome",
}


@pytest.mark.parametrize("text", WORDS)
def test_a_word_keeps_what_combines_with_it_and_scripts_without_spaces_are_parted(text: str) -> None:
    assert " ".join(text[start:end] for start, end in split_words(text)) == WORDS[text]
