"""Splits a text into words and signs, for character spans and for answers with offsets."""

from __future__ import annotations

import re
import unicodedata

# Scripts without spaces between words: Thai to Tibetan, Myanmar, Khmer, kana, Han. A sentence is not one word.
_SINGLE = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")
_LETTERS = re.compile(rf"[^\W{_SINGLE}]")
_JOINERS = "\u00ad\u200c\u200d"
"""The soft hyphen, and the joiners of Persian words and some emoji."""


def split_words(text: str) -> list[tuple[int, int]]:
    """The words and signs of a text as character offsets (start, end).

    What combines with the character before it, such as an accent, a vowel sign or a skin tone, is never apart from it.
    Of scripts without spaces each character is a word.
    """
    found: list[tuple[int, int]] = []
    # What may continue the last word if it follows directly: nothing, a letter, or anything.
    goes_on = ""
    for match in _WORD.finditer(text):
        start, end = match.span()
        part = text[start:end]
        follows = bool(found) and found[-1][1] == start
        if follows and (goes_on == "any" or (goes_on == "letters" and _is_word(part))):
            found[-1] = (found[-1][0], end)
            goes_on = ""
        elif _is_mark(part):
            if not follows:
                goes_on = ""
                if unicodedata.category(part) != "Cf":
                    found.append((start, end))
                continue
            goes_on = "any" if part == "\u200d" else "letters" if _is_word(text[found[-1][0] :][:1]) else ""
            found[-1] = (found[-1][0], end)
        elif unicodedata.category(part[0]) not in ("Cf", "Cc"):
            found.append((start, end))
            goes_on = ""
    return found


def _is_word(part: str) -> bool:
    return bool(_LETTERS.match(part))


def _is_mark(part: str) -> bool:
    if len(part) > 1 or part.isascii():
        return False
    is_tone = "\U0001f3fb" <= part <= "\U0001f3ff"
    return is_tone or part in _JOINERS or unicodedata.category(part).startswith("M")
