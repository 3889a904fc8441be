"""Labels that look alike are one label: `Positive` and `positive `, `1` and `1.0`, composed and decomposed letters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from shardyard_trainer.data.errors import shorten

LOOKALIKE = "LOOKALIKE_LABELS"

_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]+)\.0+")
_BITS = {"0": False, "1": True, "false": False, "true": True}
_MOST_SHOWN = 5


def canonical_key(name: str) -> str:
    """A key that is equal for names that look alike: ignores case, width, Unicode form and spaces; `1.0` is `1`."""
    plain = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
    number = _WHOLE_NUMBER.fullmatch(plain)
    return ("0" if number[1] == "-0" else number[1]) if number else plain


def as_bit(cell: Any) -> bool | None:
    """0 or 1 in any notation; None for anything else."""
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, int | float):
        return bool(cell) if cell in (0, 1) else None
    return _BITS.get(canonical_key(cell)) if isinstance(cell, str) else None


class KnownLabels:
    """A spec's labels, also found by look-alike spellings unless two labels look alike."""

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = tuple(labels)
        self._exact = frozenset(self.labels)
        by_key: dict[str, list[str]] = defaultdict(list)
        for label in self.labels:
            by_key[canonical_key(label)].append(label)
        self._by_key = {key: found[0] for key, found in by_key.items() if len(found) == 1}

    def find(self, name: str) -> str | None:
        """The spec's label for a name found in the data; None if no label, or more than one, looks like it."""
        return name if name in self._exact else self._by_key.get(canonical_key(name))


class Spellings:
    """Collects the spellings of labels in the data and joins look-alikes into one label."""

    def __init__(self, known: KnownLabels | None) -> None:
        self._known = known
        self._counts: Counter[str] = Counter()

    def add(self, spelling: str, times: int = 1) -> None:
        """Counts one occurrence of a label as written, surrounding spaces included."""
        self._counts[spelling] += times

    def labels(self) -> dict[str, str]:
        """Maps each spelling to its label: the spec's, else the most frequent spelling; ties go to the first."""
        if self._known is not None:
            return {spelling: self._known.find(spelling.strip()) or spelling.strip() for spelling in self._counts}
        groups: dict[str, Counter[str]] = defaultdict(Counter)
        for spelling, count in self._counts.items():
            groups[canonical_key(spelling)][_plain(spelling)] += count
        chosen = {key: max(names, key=lambda name: names[name]) for key, names in groups.items()}
        return {spelling: chosen[canonical_key(spelling)] for spelling in self._counts}

    def note(self) -> str:
        """The warning about labels with several spellings; empty if there are none."""
        spelled: dict[str, list[str]] = defaultdict(list)
        for spelling, label in self.labels().items():
            spelled[label].append(spelling)
        odd = {label: found for label, found in spelled.items() if len(found) > 1 or found[0].strip() != label}
        if not odd:
            return ""
        shown = "; ".join(
            f"{_listed([(each, self._counts[each]) for each in found])} as '{shorten(label)}'"
            for label, found in list(odd.items())[:_MOST_SHOWN]
        )
        more = f"; and {len(odd) - _MOST_SHOWN} more" if len(odd) > _MOST_SHOWN else ""
        return (
            f"labels that look alike are read as one: {shown}{more}; write each label in one way, "
            "or list them all in labels if they are different classes"
        )


def _plain(spelling: str) -> str:
    name = unicodedata.normalize("NFC", spelling.strip())
    return canonical_key(name) if _WHOLE_NUMBER.fullmatch(name) else name


def _listed(spellings: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{_visible(spelling)} ({count:,}×)" for spelling, count in spellings[:_MOST_SHOWN])
    return f"{shown} …" if len(spellings) > _MOST_SHOWN else shown


def _visible(spelling: str) -> str:
    """The spelling in quotes; with code points if not ASCII, as composed and decomposed letters look the same."""
    codes = (
        "" if unicodedata.is_normalized("NFKC", spelling) else f" = {spelling[:20].encode('unicode_escape').decode()}"
    )
    return f"'{shorten(spelling)}'{codes}"
