"""The stories of `make quickstart TASK=…`: their files, their baselines, and packages that cannot be had."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from helpers.beside import script
from helpers.repository import ROOT
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.idx import read_idx
from shardyard_trainer.data.sources import DataFile

stories = script("examples/quickstart", "stories")
ner = script("examples/quickstart", "stories.ner")
images = script("examples/quickstart", "stories.images")
instruct = script("examples/quickstart", "stories.instruct")
translate = script("examples/quickstart", "stories.translate")
assets = script("examples/quickstart", "assets")

ADDRESSES = """<AddressCollection>
  <AddressString><AddressNumber>12</AddressNumber> <StreetName>MARTIN</StreetName> <StreetName>KING</StreetName>
  <StreetNamePostType>Road,</StreetNamePostType> <PlaceName>San Jose</PlaceName></AddressString>
  <AddressString></AddressString>
</AddressCollection>"""


@pytest.mark.parametrize("name", stories.NAMES)
def test_a_story_has_all_its_parts(name: str) -> None:
    module = script("examples/quickstart", f"stories.{name}")
    for part in stories.Story.__annotations__ | {"prepare": 0, "job": 0, "compare": 0, "ask": 0}:
        assert hasattr(module, part), f"{name} has no {part}"


def test_the_makefile_and_the_docs_name_every_story() -> None:
    for page in ("Makefile", "docs/quickstart.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{name}\b", text) for name in stories.NAMES), page


def test_an_address_is_words_with_a_part_over_several_of_them(tmp_path: Path) -> None:
    (tmp_path / "labeled.xml").write_text(ADDRESSES)
    (address,) = ner.read(tmp_path / "labeled.xml")
    assert address == (
        ("12", "MARTIN", "KING", "Road,", "San", "Jose"),
        ("B-AddressNumber", "B-StreetName", "I-StreetName", "B-StreetNamePostType", "B-PlaceName", "I-PlaceName"),
    )


@pytest.mark.parametrize(
    ("found", "f1"),
    [
        (["B-A", "I-A", "O"], 1.0),
        (["B-A", "O", "O"], 0.0),
        (["B-A", "I-A", "B-C"], 2 / 3),
        (["I-A", "I-A", "O"], 0.0),
        (["B-A", "B-A", "O"], 0.0),
    ],
)
def test_an_entity_counts_if_it_is_whole(found: list[str], f1: float) -> None:
    assert ner.entity_f1([["B-A", "I-A", "O"]], [found]) == pytest.approx(f1)


def test_digits_are_files_that_the_service_reads(tmp_path: Path) -> None:
    train, test = images.digits()
    assert (len(train[0]), len(test[0])) == (1497, 300)
    folder = images.write(tmp_path / "test", test)
    files = [DataFile(path, path.name, spec_pb2.DATA_FORMAT_IDX) for path in sorted(folder.iterdir())]
    read = list(read_idx(files))
    assert [int(label) for *_, label in read] == test[1].tolist()
    assert np.array_equal(np.asarray(read[7][2]), test[0][7])


def test_a_machine_without_apt_says_so(tmp_path: Path) -> None:
    with pytest.raises(assets.AssetsUnavailable, match="no-such-program is not installed"):
        images.run("no-such-program", folder=str(tmp_path))
    with pytest.raises(assets.AssetsUnavailable, match="dataset-fashion-mnist: "):
        images.run("ls", "no-such-file", folder=str(tmp_path))


def test_an_address_of_a_chat_has_all_parts_without_commas() -> None:
    words = ("12", "MARTIN", "KING", "Road,", "San", "Jose,", "CA")
    kinds = ("AddressNumber", "StreetName", "StreetName", "StreetNamePostType", "PlaceName", "PlaceName", "StateName")
    tags = tuple(f"B-{kind}" for kind in kinds)
    without_number = (words[1:], tags[1:])
    assert instruct.examples([(words, tags), without_number, (words, tags)]) == [
        ("12 MARTIN KING Road, San Jose, CA", {"number": "12", "street": "MARTIN KING", "place": "San Jose"})
    ]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ('{"place": "Rome", "number": "1", "street": "Oak"}', True),
        ('{"number": "1", "street": "Oak"}', False),
        ('{"number": 1, "street": "Oak", "place": "Rome"}', False),
        ('The answer is {"number": "1", "street": "Oak", "place": "Rome"}', False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_it_is_json_with_all_parts(answer: str, is_right: bool) -> None:
    parts = {"number": "1", "street": "Oak", "place": "Rome"}
    assert instruct.share_right([answer], [("1 Oak St, Rome", parts)]) == is_right


def test_the_rule_counts_words() -> None:
    right = {"number": "12", "street": "Main", "place": "Akron"}
    assert json.loads(instruct.by_rule("12 Main St, Akron, OH 44301")) == right
    assert json.loads(instruct.by_rule("12")) == {"number": "12", "street": "12", "place": "12"}


def test_conversations_end_with_the_answer(tmp_path: Path) -> None:
    path = instruct.write(tmp_path / "new" / "train.jsonl", [("1 Oak St, Rome", {"number": "1"})])
    (line,) = path.read_text(encoding="utf-8").splitlines()
    question, answer = json.loads(line)["messages"]
    assert question["role"] == "user" and question["content"].endswith(": 1 Oak St, Rome")
    assert answer == {"role": "assistant", "content": '{"number": "1"}'}


def test_what_is_held_out_of_the_phrases_is_in_none_of_those_to_learn_from() -> None:
    train, test = translate.wishes(2000, held_out=False), translate.wishes(200, held_out=True)
    assert (len(set(train)), len(set(test))) == (2000, 200)

    def content(wish: tuple[str | int, ...]) -> object:
        kind, first, *rest = wish
        if kind == "places":
            return frozenset([first, *rest])
        return str(first)[:10]  # The day of a moment; the number of an amount.

    assert {kind for kind, *_ in test} == {"moment", "places", "amount"}
    assert not {content(wish) for wish in train} & {content(wish) for wish in test}


def test_the_most_similar_phrase_shares_rare_words() -> None:
    train = [("in Rome and Oslo", "à Rome et Oslo"), ("in Paris", "à Paris"), ("in Paris and Oslo", "à Paris et Oslo")]
    assert translate.of_most_similar(train, [("Oslo and Paris", ""), ("Rome", "")]) == [
        "à Paris et Oslo",
        "à Rome et Oslo",
    ]


def test_only_the_two_languages_are_unpacked_and_a_package_that_fails_says_why(tmp_path: Path) -> None:
    data = [f"babel/locale-data/{name}.dat" for name in ("root", "en", "fr", "de")]
    with zipfile.ZipFile(tmp_path / "babel.whl", "w") as wheel:
        for name in (*data, "babel/global.dat", "babel/messages/mofile.py"):
            wheel.writestr(name, "")
        wheel.writestr("babel/__init__.py", "raise ValueError('it is broken')")
    translate.unpack(tmp_path / "babel.whl", tmp_path / "unpacked")
    assert sorted(path.name for path in tmp_path.glob("unpacked/babel/locale-data/*")) == [
        "en.dat",
        "fr.dat",
        "root.dat",
    ]
    with pytest.raises(
        assets.AssetsUnavailable, match=r"babel==2\.18\.0 does not write phrases: ValueError: it is broken"
    ):
        translate.phrases(tmp_path / "unpacked", [("amount", 2, "length-kilometer")])
