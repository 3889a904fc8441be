"""Tags of words: detects their scheme, normalises them to one, and finds the entities they mark."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shardyard_trainer.data.errors import DataError, shorten

BIO, IOB1, BIOES, PLAIN = "BIO", "IOB1", "BIOES", "PLAIN"
"""B on every entity; B only after an entity of the same kind; marks for ends and single words; no entities."""

OUTSIDE = "O"
_TAG = re.compile(r"([BIESLUMbi])-(.+)", re.DOTALL)
_OTHERWISE = re.compile(r"[BIESLUM][_:|/]\S+|\S+[-_][BIESLUM]")
"""Other notations, which are refused: `B_PER`, `PER-B`."""

_OPEN = frozenset("BSU")
_SINGLE_OR_END = frozenset("ESLU")
_BARE = frozenset("BIOESLUM")


@dataclass
class SchemeFinder:
    """Collects the tags of texts and determines their scheme."""

    has_ends: bool = False
    opens_with_inside: int = 0
    opens_with_begin: int = 0
    seen: set[str] = field(default_factory=set)
    plain: Counter[str] = field(default_factory=Counter)
    marked: Counter[str] = field(default_factory=Counter)
    places: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, tags: Sequence[str], file: str = "", line: int = 0) -> None:
        """Takes the tags of one text, which begins in this line."""
        before = ("", "")
        for tag in tags:
            mark, kind = parts(tag)
            if tag not in self.seen:
                self.seen.add(tag)
                self.places[tag] = (file, line)
            if tag != OUTSIDE:
                (self.marked if mark else self.plain)[tag] += 1
            self.has_ends = self.has_ends or mark in _SINGLE_OR_END
            follows_its_like = bool(before[0]) and before[1] == kind
            if mark == "I" and not follows_its_like:
                self.opens_with_inside += 1
            if mark == "B" and not follows_its_like:
                self.opens_with_begin += 1
            before = (mark, kind)

    def find(self, wish: str = "") -> str:
        """The scheme of all tags seen, or the requested one. Raises DataError for tags outside it."""
        if wish != PLAIN and self.plain and (self.marked or wish):
            self._refuse_mixed()
        if not wish and self.plain and all(_OTHERWISE.fullmatch(tag) for tag in self.plain):
            raise self._wrong(next(iter(self.plain)), "write B-PER and I-PER for an entity of the kind PER")
        return wish or self._found()

    def _refuse_mixed(self) -> None:
        plain, _ = self.plain.most_common()[-1]
        marked = next(iter(self.marked), "B-PER")
        if self.marked and self.marked.total() < self.plain.total():
            rarest, _ = self.marked.most_common()[-1]
            raise self._wrong(
                rarest, f"it has a mark, but others have none, such as {shorten(plain)!r}; write all alike"
            )
        message = f"it has no B- or I-, but entities have one, as {shorten(marked)!r}; write {OUTSIDE} outside of them"
        raise self._wrong(plain, message)

    def _wrong(self, tag: str, rule: str) -> DataError:
        file, line = self.places[tag]
        message = f"the tag {shorten(tag)!r}: {rule}, or set scheme to PLAIN if tags mean no entities"
        return DataError(message, file=file, line=line, value=tag)

    def _found(self) -> str:
        if not self.marked:
            return PLAIN
        if self.has_ends:
            return BIOES
        return IOB1 if self.opens_with_inside and not self.opens_with_begin else BIO


def parts(tag: str) -> tuple[str, str]:
    """(mark, kind) of a tag such as `B-PER`; the mark is empty for others, `O` among them."""
    match = _TAG.fullmatch(tag)
    return (match[1].upper(), match[2]) if match else ("", "")


def to_bio(tags: Sequence[str], scheme: str) -> list[str]:
    """Normalises to BIO: B on the first word of each entity, I on the others; plain tags stay as they are."""
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
            # In IOB1 a B separates two entities of a kind; in others an I without its B still starts an entity.
            found.append(f"I-{kind}" if goes_on and mark not in _OPEN else f"B-{kind}")
        before = (mark, kind)
    return found


def labels_of(seen: Iterable[str], scheme: str) -> tuple[str, ...]:
    """A model's labels for the tags seen: O first, then B and I of each kind; plain tags sorted."""
    if scheme == PLAIN:
        return tuple(sorted(set(seen)))
    kinds = sorted({parts(tag)[1] for tag in seen} - {""})
    return (OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))


def are_bare_marks(labels: Iterable[str]) -> bool:
    """Whether labels are the marks of a scheme without kinds of entities: B and I, and others such as O, E and S."""
    found = {label.upper() for label in labels}
    return found >= {"B", "I"} and found <= _BARE


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, end) of the entities in BIO tags, strictly: a run that starts with I is not an entity."""
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
