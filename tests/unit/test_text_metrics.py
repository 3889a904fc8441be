"""BLEU splits texts as their language is written."""

from __future__ import annotations

import pytest

from shardyard_trainer.tasks.text_metrics import Written, bleu_signature, translation_scores


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        ("zh", "zh"),
        ("zh-CN", "zh"),
        ("zh_TW", "zh"),
        ("zho", "zh"),
        ("zho_Hans", "zh"),
        ("cmn-Hant", "zh"),
        ("yue_Hant", "zh"),
        ("ja", "char"),
        ("ja_XX", "char"),
        ("jpn", "char"),
        ("jpn_Jpan", "char"),
        ("ko_KR", "char"),
        ("KOR", "char"),
        ("kor_Hang", "char"),
        ("th", "char"),
        ("tha_Thai", "char"),
        ("de", "13a"),
        ("deu_Latn", "13a"),
        ("tho", "13a"),
        ("", "13a"),
    ],
)
def test_bleu_is_counted_with_the_tokenizer_of_the_language(language: str, tokenizer: str) -> None:
    assert f"|tok:{tokenizer}|" in bleu_signature(language)


@pytest.mark.parametrize("languages", [("zh", "zho_Hans"), ("ja", "jpn_Jpan"), ("th", "tha_Thai")])
def test_a_language_has_one_score_however_its_code_is_written(languages: tuple[str, str]) -> None:
    texts = Written(["a"], ["我喜欢这本书因为它很有趣"], ["我喜欢这本书它很有趣"])
    short, long = (translation_scores(texts, language) for language in languages)
    assert short == long and short["bleu"] > 0
