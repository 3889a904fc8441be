"""ROUGE-1, ROUGE-2 and ROUGE-Lsum (Lin, 2004): F-measures from 0 to 100, as in the package rouge-score.

Words are runs of letters and digits, lower case, not stemmed. The package knows ASCII letters only; here letters of
all alphabets count, so ASCII texts get the package's numbers, and others are scored too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+")
# After a sentence's final punctuation and closing quotes, before the start of the next sentence; or a line break.
_BETWEEN = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-zà-ÿ])|(?<=[。！？])|\n")


class Rouge(NamedTuple):
    """The three scores of one text, or their means over several."""

    rouge_1: float
    rouge_2: float
    rouge_lsum: float


def rouge(targets: Sequence[str], texts: Sequence[str]) -> Rouge:
    """The mean scores over pairs of an expected and a written text."""
    found = [_rouge(target, text) for target, text in zip(targets, texts, strict=True)]
    return Rouge(*(100 * sum(each) / len(found) for each in zip(*found, strict=True))) if found else Rouge(0, 0, 0)


def sentences(text: str) -> list[str]:
    """A text's sentences, split at punctuation and line breaks."""
    return [each for part in _BETWEEN.split(text) if (each := part.strip())]


def _rouge(target: str, text: str) -> Rouge:
    wanted, found = _words(target), _words(text)
    summary = [_words(each) for each in sentences(target)], [_words(each) for each in sentences(text)]
    return Rouge(_runs(wanted, found, 1), _runs(wanted, found, 2), _union(*summary))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(wanted: Sequence[str], found: Sequence[str], size: int) -> float:
    """The score of the runs of this many words that both texts have."""
    ours, theirs = (Counter(zip(*(words[at:] for at in range(size)), strict=False)) for words in (found, wanted))
    return _f_measure((ours & theirs).total(), ours.total(), theirs.total())


def _union(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """ROUGE-Lsum: the words of each wanted sentence in its longest common subsequences with the found ones."""
    left, wanted_left = Counter(w for each in found for w in each), Counter(w for each in wanted for w in each)
    total_found, total_wanted, hits = left.total(), wanted_left.total(), 0
    for sentence in wanted:
        places = {place for other in found for place in _common(sentence, other)}
        for word in (sentence[place] for place in sorted(places)):
            if left[word] and wanted_left[word]:
                hits += 1
                left[word] -= 1
                wanted_left[word] -= 1
    return _f_measure(hits, total_found, total_wanted)


def _common(one: Sequence[str], other: Sequence[str]) -> list[int]:
    """The places in `one` of the words of a longest common subsequence."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, there in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if word == there else max(table[i][j + 1], table[i + 1][j])
    places = []
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        # Ties are broken as in the package.
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]


def _f_measure(hits: int, found: int, wanted: int) -> float:
    return 2 * hits / (found + wanted) if hits else 0.0
