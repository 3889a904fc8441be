"""Words in windows: each is answered once, whatever tokenizer and window; tags mean one thing in any scheme."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_folders import bert_tokenizer, gpt2_tokenizer
from shardyard_trainer.data.tags import BIO, BIOES, IOB1, PLAIN, SchemeFinder, entities, labels_of, to_bio
from shardyard_trainer.data.word_split import split_words
from shardyard_trainer.inputs.tokenization import ensure_pad, prepare
from shardyard_trainer.inputs.words import WordCutter

KINDS = {"bert": bert_tokenizer, "gpt2": gpt2_tokenizer}
WORDS = st.lists(
    st.sampled_from(["dog", "cats", "unbelievable", "a", "U.S.", "\u200b", "é", "don't", "#"]), max_size=40
)


@pytest.mark.parametrize("kind", KINDS)
@given(words=WORDS, length=st.integers(6, 40), overlap=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_every_word_is_answered_once_and_in_its_order(kind: str, words: list[str], length: int, overlap: int) -> None:
    tokenizer = prepare(KINDS[kind]())
    ensure_pad(tokenizer)
    windows = WordCutter(tokenizer, length, overlap).cut(words)
    answered = [word for window in windows for word, first in zip(window.words, window.firsts, strict=True) if first]
    assert answered == sorted(set(answered))
    # A word without a token of its own has nothing to be answered at.
    whole = WordCutter(tokenizer, 10_000, 0).cut(words)
    assert answered == [word for word, first in zip(whole[0].words, whole[0].firsts, strict=True) if first]
    assert len(whole) == 1
    for window in windows:
        assert 1 <= len(window.ids) <= length
        assert len(window.ids) == len(window.type_ids) == len(window.words) == len(window.firsts)


def test_a_word_at_a_seam_is_answered_by_the_window_with_more_around_it() -> None:
    tokenizer = prepare(bert_tokenizer())
    first, second = WordCutter(tokenizer, 10, 4).cut(["dog"] * 12)
    assert [word for word, is_first in zip(first.words, first.firsts, strict=True) if is_first] == [0, 1, 2, 3, 4, 5]
    # [CLS], two words that the first window answers for, and those that follow.
    assert second.words[:4] == [-1, -1, -1, 6]


def test_words_keep_their_offsets_in_the_text() -> None:
    text = "Anna's dog (3.5 kg), Zürich."
    assert [text[start:end] for start, end in split_words(text)] == [
        "Anna", "'", "s", "dog", "(", "3", ".", "5", "kg", ")", ",", "Zürich", "."
    ]  # fmt: skip


SCHEMES = {
    BIO: ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "O", "B-PER"],
    IOB1: ["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "O", "I-PER"],
    BIOES: ["B-PER", "E-PER", "O", "S-LOC", "S-LOC", "O", "S-PER"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tags_of_any_scheme_are_found_and_mean_the_same(scheme: str) -> None:
    finder = SchemeFinder()
    finder.add(SCHEMES[scheme])
    assert finder.find() == scheme
    assert to_bio(SCHEMES[scheme], finder.find()) == SCHEMES[BIO]
    assert labels_of(finder.seen, finder.find()) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert entities(SCHEMES[BIO]) == [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("PER", 6, 7)]


def test_tags_without_marks_mean_no_entities() -> None:
    finder = SchemeFinder()
    finder.add(["NOUN", "VERB", "O", "I"])
    assert finder.find() == PLAIN and to_bio(["NOUN", "O"], PLAIN) == ["NOUN", "O"]
    assert labels_of(finder.seen, PLAIN) == ("I", "NOUN", "O", "VERB")
    only_outside = SchemeFinder()
    only_outside.add(["O", "O"])
    assert only_outside.find() == PLAIN


def test_an_entity_that_begins_with_inside_counts_in_data_but_not_in_answers() -> None:
    assert entities(["O", "I-PER", "I-PER"]) == []
    assert to_bio(["O", "I-PER", "I-LOC"], BIO) == ["O", "B-PER", "B-LOC"]
