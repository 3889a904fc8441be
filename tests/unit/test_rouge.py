"""ROUGE has the numbers of the package rouge-score 0.1.2 (use_stemmer=False, sentences on lines of their own)."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardyard_trainer.tasks.rouge import rouge, sentences

# Wanted text, written text, and what the package computed: F-measures of rouge1, rouge2 and rougeLsum.
PAIRS = [
    (
        "The cat sat on the mat.\nIt was warm, and the dog slept.",
        "A cat was on the mat.\nThe dog slept; it was very warm.",
        (0.7692307692, 0.4166666667, 0.6153846154),
    ),
    ("police killed the gunman", "police kill the gunman", (0.75, 0.3333333333, 0.75)),
    ("the the the cat", "the cat the", (0.8571428571, 0.4, 0.5714285714)),
    (
        "Results improve by 3.5 points on BLEU-4 (p < 0.05).",
        "We improve BLEU by 3.5 points.\nThe p value is 0.05.",
        (0.72, 0.347826087, 0.64),
    ),
    ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", (0.5333333333, 0.1538461538, 0.5333333333)),
    ("one sentence only", "completely different words", (0.0, 0.0, 0.0)),
    ("a b c d e f g", "g f e d c b a\na b d g", (0.7777777778, 0.125, 0.4444444444)),
]


@pytest.mark.parametrize(("target", "text", "expected"), PAIRS)
def test_a_pair_has_the_packages_numbers(target: str, text: str, expected: tuple[float, float, float]) -> None:
    assert rouge([target], [text]) == pytest.approx([100 * each for each in expected], abs=1e-7)


def test_several_have_the_mean() -> None:
    targets, texts, numbers = zip(*PAIRS, strict=True)
    means = [100 * sum(each) / len(numbers) for each in zip(*numbers, strict=True)]
    assert rouge(targets, texts) == pytest.approx(means, abs=1e-7)


def test_other_alphabets_have_words_too() -> None:
    assert rouge(["Кошка спит"], ["кошка ест"]).rouge_1 == pytest.approx(50)
    assert rouge(["Über Öl"], ["über öl"]).rouge_2 == 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rains. Take a coat!  Do you?", ["It rains.", "Take a coat!", "Do you?"]),
        ("He said “no.” She left (at 3.5 p.m. sharp).", ["He said “no.", "She left (at 3.5 p.m. sharp)."]),
        ("one\n\n two \n", ["one", "two"]),
        ("one \t\r\n \n\n  two\u2003\n", ["one", "two"]),
        ("It ended. \n he left\n“Why?”\n Nobody", ["It ended.", "he left", "“Why?", "Nobody"]),
        (" \n \n ", []),
        ("版本。完成！", ["版本。", "完成！"]),
        ("Größe 3. Äpfel fallen.", ["Größe 3.", "Äpfel fallen."]),
        ("", []),
    ],
)
def test_texts_are_parted_into_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


SPACES = 2_000_000
"""So many that a search that begins anew at each of them would never end."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one" + " " * SPACES + "two", ["one" + " " * SPACES + "two"]),
        ("one" + " " * SPACES + "\ntwo", ["one", "two"]),
        ("one.” " + "\u3000" * SPACES + "two", ["one.” " + "\u3000" * SPACES + "two"]),
        ("one\n" * 1000 + "\t" * SPACES, ["one"] * 1000),
    ],
)
def test_runs_of_white_space_are_searched_once(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


TWICE_SEARCHED = re.compile(
    r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-zà-ÿ])|(?<=[。！？])|\s*\n\s*",
)
"""The same rule with the white space around a line break, which takes the square of its length to find."""


@given(text=st.text(st.sampled_from(' \n\r\t\u3000\x1c.!…。”"(Aa1é'), max_size=14))
@settings(max_examples=500, deadline=None)
def test_white_space_around_a_line_break_is_in_no_sentence(text: str) -> None:
    assert sentences(text) == [each for part in TWICE_SEARCHED.split(text) if (each := part.strip())]
