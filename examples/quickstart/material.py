"""What the quickstart trains on, as files: unlabelled text, a few labels, all labels, and a held-out test set.

Normally movie review snippets that people scored; without the packages, the docstrings of Python's standard library.
"""

from __future__ import annotations

import ast
import csv
import html
import random
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SPLIT_SEED = 7
HELD_OUT = 1000
NEUTRAL = 0.5
FEW_LABELS = 2000

Example = tuple[str, str]
"""A text and its label."""


@dataclass(frozen=True)
class Material:
    """Files in one folder; the CSV files have the columns `text` and `label`."""

    title: str
    unlabelled: Path
    few: Path
    all: Path
    test: Path
    num_few: int
    num_all: int
    num_test: int
    majority: float


def reviews(snippets: Path, folder: Path) -> Material:
    """Movie review snippets: `good` for a mean score above 0, `bad` below; those nearer to 0 than 0.5 are left out."""
    scored = list(read_snippets(snippets / "movieReviewSnippets_GroundTruth.txt").items())
    random.Random(SPLIT_SEED).shuffle(scored)
    held_out, rest = scored[:HELD_OUT], scored[HELD_OUT:]
    kept = [text for text, _ in rest]
    for others in ("amazonReview", "nytEditorial", "tweets"):
        name = others + ("Snippets" if others != "tweets" else "") + "_GroundTruth.txt"
        kept += read_snippets(snippets / name)
    return write(
        folder,
        "movie reviews",
        unlabelled=kept,
        train=with_labels(rest),
        test=with_labels(held_out),
        num_few=FEW_LABELS,
    )


def read_snippets(path: Path) -> dict[str, float]:
    """Text → mean score, in the order of the file; a text that comes again is left out."""
    scores: dict[str, float] = {}
    for line in path.read_text(encoding="latin-1").split("\n"):
        fields = line.strip().split("\t")
        if len(fields) == 3:
            scores.setdefault(html.unescape(fields[2]).strip(), float(fields[1]))
    return scores


def with_labels(scored: Iterable[tuple[str, float]]) -> list[Example]:
    """The snippets that are clearly good or bad."""
    return [(text, "good" if score > 0 else "bad") for text, score in scored if abs(score) >= NEUTRAL]


def docstrings(folder: Path, *, num_packages: int = 10, few_per_class: int = 16) -> Material:
    """Docstrings of the standard library; the label is the top-level package, of the ten with the most docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [(text, package) for path in sorted(root.rglob("*.py")) for package, text in docstrings_of(path, root)]
    found = list(dict(found).items())
    packages = [name for name, _ in Counter(package for _, package in found).most_common(num_packages)]
    labelled = [(text, package) for text, package in found if package in packages]
    random.Random(SPLIT_SEED).shuffle(labelled)
    num_test = len(labelled) // 5
    test, train = labelled[:num_test], labelled[num_test:]
    held_out = {text for text, _ in test}
    train = few_of_each_first(train, few_per_class)
    return write(
        folder,
        "docstrings",
        unlabelled=[text for text, _ in found if text not in held_out],
        train=train,
        test=test,
        num_few=num_packages * few_per_class,
    )


def few_of_each_first(examples: list[Example], few: int) -> list[Example]:
    """The same examples, the first few of each label at the front."""
    seen: Counter[str] = Counter()
    front, rest = [], []
    for example in examples:
        seen[example[1]] += 1
        (front if seen[example[1]] <= few else rest).append(example)
    return front + rest


def docstrings_of(path: Path, root: Path) -> Iterable[tuple[str, str]]:
    """(package, docstring) of everything in a file that has one; nothing for tests and for files that do not parse."""
    parts = path.relative_to(root).with_suffix("").parts
    if {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(parts):
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join(textwrap.dedent(ast.get_docstring(node) or "").split())
            if len(text) >= 20:
                yield parts[0], text


def write(
    folder: Path, title: str, *, unlabelled: list[str], train: list[Example], test: list[Example], num_few: int
) -> Material:
    """The files of a material. The first `num_few` examples of `train` are the few."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unlabelled.txt").write_text("\n".join(unlabelled) + "\n", encoding="utf-8")
    for name, examples in (("few", train[:num_few]), ("all", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(examples)
    most_common = Counter(label for _, label in test).most_common(1)[0][1]
    return Material(
        title=title,
        unlabelled=folder / "unlabelled.txt",
        few=folder / "few.csv",
        all=folder / "all.csv",
        test=folder / "test.csv",
        num_few=num_few,
        num_all=len(train),
        num_test=len(test),
        majority=most_common / len(test),
    )


def read(path: Path) -> list[Example]:
    """The examples of one of the CSV files."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]
