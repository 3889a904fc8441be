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
    """The same for names that look alike: of any case, width and Unicode form, spaces apart, `1.0` as `1`."""
    plain = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
    number = _WHOLE_NUMBER.fullmatch(plain)
    return ("0" if number[1] == "-0" else number[1]) if number else plain


def as_bit(cell: Any) -> bool | None:
    """0 or 1, however it is written; None for anything else."""
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, int | float):
        return bool(cell) if cell in (0, 1) else None
    return _BITS.get(canonical_key(cell)) if isinstance(cell, str) else None


class KnownLabels:
    """Labels that a spec names, found by what looks like them too, unless two of them do."""

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = tuple(labels)
        self._exact = frozenset(self.labels)
        by_key: dict[str, list[str]] = defaultdict(list)
        for label in self.labels:
            by_key[canonical_key(label)].append(label)
        self._by_key = {key: found[0] for key, found in by_key.items() if len(found) == 1}

    def find(self, name: str) -> str | None:
        """The label that a name of the data means."""
        return name if name in self._exact else self._by_key.get(canonical_key(name))


class Spellings:
    """Gathers how labels are spelled in the data, and makes one label of those that look alike."""

    def __init__(self, known: KnownLabels | None) -> None:
        self._known = known
        self._counts: Counter[str] = Counter()

    def add(self, spelling: str, times: int = 1) -> None:
        """Counts a label as it is written, with the spaces around it."""
        self._counts[spelling] += times

    def labels(self) -> dict[str, str]:
        """The label of each spelling: the spec's, else the most frequent spelling, of equal ones the first."""
        if self._known is not None:
            return {spelling: self._known.find(spelling.strip()) or spelling.strip() for spelling in self._counts}
        groups: dict[str, Counter[str]] = defaultdict(Counter)
        for spelling, count in self._counts.items():
            groups[canonical_key(spelling)][_plain(spelling)] += count
        chosen = {key: max(names, key=lambda name: names[name]) for key, names in groups.items()}
        return {spelling: chosen[canonical_key(spelling)] for spelling in self._counts}

    def note(self) -> str:
        """What to warn of; an empty string if each label is spelled in one way."""
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
    """In quotes; what is not ASCII with its code points, as composed and decomposed letters look the same."""
    codes = (
        "" if unicodedata.is_normalized("NFKC", spelling) else f" = {spelling[:20].encode('unicode_escape').decode()}"
    )
    return f"'{shorten(spelling)}'{codes}"
