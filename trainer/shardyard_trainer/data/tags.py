"""Tags of words: the scheme that they are written in, one scheme for all, and the entities that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BIO, IOB1, BIOES, PLAIN = "BIO", "IOB1", "BIOES", "PLAIN"
"""B opens every entity; B opens only one behind its like; with marks for ends and single words; no entities at all."""

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
_OPEN = frozenset("BSU")
_SINGLE_OR_END = frozenset("ESLU")


@dataclass
class SchemeFinder:
    """Looks at the tags of texts and says which scheme they are in."""

    has_plain: bool = False
    has_ends: bool = False
    opens_with_inside: int = 0
    opens_with_begin: int = 0
    seen: set[str] = field(default_factory=set)

    def add(self, tags: Sequence[str]) -> None:
        """Takes the tags of one text."""
        before = ("", "")
        for tag in tags:
            self.seen.add(tag)
            mark, kind = parts(tag)
            if not mark and tag != OUTSIDE:
                self.has_plain = True
            self.has_ends = self.has_ends or mark in _SINGLE_OR_END
            follows_its_like = bool(before[0]) and before[1] == kind
            if mark == "I" and not follows_its_like:
                self.opens_with_inside += 1
            if mark == "B" and not follows_its_like:
                self.opens_with_begin += 1
            before = (mark, kind)

    @property
    def scheme(self) -> str:
        """The scheme of all tags seen."""
        if self.has_plain or not any(parts(tag)[0] for tag in self.seen):
            return PLAIN
        if self.has_ends:
            return BIOES
        return IOB1 if self.opens_with_inside and not self.opens_with_begin else BIO


def parts(tag: str) -> tuple[str, str]:
    """(mark, kind) of a tag such as `B-PER`; the mark is empty for others, `O` among them."""
    match = _TAG.fullmatch(tag)
    return (match[1], match[2]) if match else ("", "")


def to_bio(tags: Sequence[str], scheme: str) -> list[str]:
    """The same entities with a B where each begins and an I on its other words; plain tags as they are."""
    if scheme == PLAIN:
        return list(tags)
    found = []
    before = ("", "")
    for tag in tags:
        mark, kind = parts(tag)
        if not mark:
            found.append(OUTSIDE)
        else:
            goes_on = bool(before[0]) and before[1] == kind and before[0] not in _SINGLE_OR_END
            # In IOB1 a B parts two of a kind; elsewhere an I without its B opens an entity all the same.
            found.append(f"I-{kind}" if goes_on and mark not in _OPEN else f"B-{kind}")
        before = (mark, kind)
    return found


def labels_of(seen: Iterable[str], scheme: str) -> tuple[str, ...]:
    """The labels that a model gets for the tags seen: O first, then B and I of each kind; plain ones sorted."""
    if scheme == PLAIN:
        return tuple(sorted(set(seen)))
    kinds = sorted({parts(tag)[1] for tag in seen} - {""})
    return (OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, end) of the entities of BIO tags, strictly: what begins with an I is none."""
    found: list[tuple[str, int, int]] = []
    begun: tuple[str, int] | None = None
    for at, tag in enumerate([*tags, OUTSIDE]):
        mark, kind = parts(tag)
        if begun is not None and not (mark == "I" and kind == begun[0]):
            found.append((*begun, at))
            begun = None
        if mark == "B":
            begun = (kind, at)
    return found
