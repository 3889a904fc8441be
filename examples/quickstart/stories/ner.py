"""Parts of addresses: a pretrained BERT learns to tag streets, places and postal codes from 1,200 addresses.

The addresses were labelled by hand for `usaddress` (MIT, The Atlanta Journal-Constitution): its source distribution
has them as XML, an element for each word.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import assets
import show
import story

import shardyard
from shardyard.specs import Data, JobSpec, Optimization, Parallelism, Resources, TokenClassification

TITLE = "Fetch a pretrained BERT and hand-labelled addresses"
WHAT = "pretrained BERT, fine-tuned"
METRIC = "f1"
HELD_OUT = 300
ADDRESSES = assets.Package(
    requirement="usaddress==0.5.16",
    filename="usaddress-0.5.16.tar.gz",
    sha256="f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    options=("--no-binary", ":all:", "--no-build-isolation"),
)
QUESTION = "742 Evergreen Terrace Apt 3, Springfield, IL 62704"

Address = tuple[tuple[str, ...], tuple[str, ...]]
"""The words of an address, and the tag of each in BIO."""


class Material(NamedTuple):
    """The pretrained model's folder, and two files of addresses with what they hold."""

    bert: Path
    train_file: Path
    test_file: Path
    train: list[Address]
    test: list[Address]


def prepare(folder: Path) -> Material:
    """Writes JSONL with `tokens` and `tags`; no address is in both files. Raises AssetsUnavailable."""
    addresses = list(dict.fromkeys(read(fetch())))
    random.Random(0).shuffle(addresses)
    test, train = addresses[:HELD_OUT], addresses[HELD_OUT:]
    print(f"  {len(train)} addresses to learn from, {len(test)} held out")
    files = [write(folder / f"{name}.jsonl", part) for name, part in (("train", train), ("test", test))]
    return Material(assets.bert_folder(), *files, train, test)


def fetch() -> Path:
    """The XML file of labelled addresses. Raises AssetsUnavailable."""
    return assets.cached("usaddress-0.5.16", ADDRESSES, unpack) / "labeled.xml"


def job(material: Material) -> JobSpec:
    """Fine-tunes the BERT on two workers."""
    return JobSpec(
        TokenClassification(max_length=64),
        model=material.bert,
        train_data=Data(material.train_file),
        eval_data=Data(material.test_file),
        optimization=Optimization(epochs=3, global_batch_size=16, learning_rate=3e-4),
        parallelism=Parallelism(zero_stage=2),
        resources=Resources(workers=2),
    )


def compare(client: shardyard.Client, outcome: story.Outcome, material: Material) -> tuple[float, dict[str, float]]:
    """Compares with the most frequent tag of all, and of each word."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in material.train:
        for word, tag in zip(words, tags, strict=True):
            counts[word.lower()][tag] += 1
    overall = sum(counts.values(), Counter[str]()).most_common(1)[0][0]
    most = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    found = [[most.get(word.lower(), overall) for word in words] for words, _ in material.test]
    return outcome.metrics[METRIC], {
        "always the most frequent tag": outcome.metrics["majority_f1"],
        "the most frequent tag of each word": entity_f1([tags for _, tags in material.test], found),
    }


def ask(client: shardyard.Client, model: str, material: Material) -> None:
    """Prints the parts of an address that is in neither file. Raises WrongAnswer if one is at another place."""
    # Given as words: in the training data a comma is part of its word, but a plain text is split there.
    (answer,) = client.model(model).predict([shardyard.Words(QUESTION.split())])
    print(f"  {QUESTION!r}:")
    for entity in answer.entities:
        if QUESTION[entity.start : entity.end] != entity.text:
            raise show.WrongAnswer(f"{entity.text!r} is not at {entity.start} to {entity.end}")
        print(f"    {entity.label:24}{entity.text} ({entity.score:.2f})")


def unpack(archive: Path, folder: Path) -> None:
    """Takes the labelled addresses out of the source distribution."""
    with tarfile.open(archive) as tar:
        stream = tar.extractfile("usaddress-0.5.16/training/labeled.xml")
        assert stream is not None, "an archive with this checksum has the file"
        (folder / "labeled.xml").write_bytes(stream.read())


def read(path: Path) -> Iterator[Address]:
    """The addresses of a file, tags in BIO: neighbouring elements of one name are one part."""
    for address in ElementTree.parse(path).getroot():
        words, tags, before = [], [], ""
        for part in address:
            for word in (part.text or "").split():
                words.append(word)
                tags.append(f"{'I' if part.tag == before else 'B'}-{part.tag}")
                before = part.tag
        if words:
            yield tuple(words), tuple(tags)


def write(path: Path, addresses: Sequence[Address]) -> Path:
    """Writes one address per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"tokens": words, "tags": tags}) for words, tags in addresses)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def entity_f1(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities over all texts; one counts if both its words and its name are right."""
    pairs = [(set(entities(right)), set(entities(ours))) for right, ours in zip(truth, found, strict=True)]
    hits = sum(len(right & ours) for right, ours in pairs)
    total = sum(len(right) + len(ours) for right, ours in pairs)
    return 2 * hits / total if total else 0.0


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(name, first word, end) of each entity; words that begin with an I are not one."""
    name, start = "", 0
    for at, tag in enumerate([*tags, "O"]):
        if name and tag != f"I-{name}":
            yield name, start, at
            name = ""
        if tag.startswith("B-"):
            name, start = tag[2:], at
