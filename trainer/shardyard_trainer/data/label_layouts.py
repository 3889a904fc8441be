"""Several labels of a text, in the layouts people use: the whole column is examined and one way of reading chosen.

Known ways: lists of names, the same as text (`['a', 'b']`, `["a"]`), names joined by a separator, and a 0 or 1 for each
class (as a list, as text, or joined). A column that fits two of them is refused, and both are named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from shardyard_trainer.data.errors import DataError, shorten
from shardyard_trainer.data.label_canon import KnownLabels, as_bit, canonical_key

SEPARATORS = "|;,\n\t"
"""Names never contain line breaks or tabs, so these always separate names."""

Cells: TypeAlias = tuple[Any, ...]

_FRAMES = {"[": "]", "(": ")", "{": "}"}
# Possessive, so linear: each character is matched once. NumPy writes no commas between quoted items.
_ITEM = re.compile(
    r"""\s*+(?:"((?:[^"\\]++|\\.)*+)"|'((?:[^'\\]++|\\.)*+)')\s*+(?:,|$|(?=["']))|([^,"'\[\](){}]++)(?:,|$)""",
    re.DOTALL,
)
_SPACED_BITS = re.compile(r"[01]\.?0?(?: +[01]\.?0?)+")
_JOINED_BITS = re.compile(r"[01]{2,}")


@dataclass(frozen=True)
class Value:
    """A value of the label column as written, and its first occurrence."""

    written: Any
    file: str
    line: int

    def wrong(self, message: str) -> DataError:
        """A DataError at the value's first occurrence."""
        value = str(list(self.written) if isinstance(self.written, tuple) else self.written)
        return DataError(f"label {shorten(value)!r}: {message}", file=self.file, line=self.line, value=value)


@dataclass(frozen=True)
class Reading:
    """Each value as names of classes, or with `is_vector` as a 0 or 1 for each class; `way` says how it was read."""

    cells: Sequence[Cells]
    is_vector: bool
    way: str


def read_layout(values: Sequence[Value], known: KnownLabels | None, *, separator: str, like: str) -> Reading:
    """Reads the distinct values of a column. `like`: how the training data was read, which decides if two ways fit.

    Raises DataError for values that are written in two ways, or fit two readings.
    """
    texts = [value for value in values if isinstance(value.written, str) and value.written.strip()]
    if separator:
        split, way = _splitter(separator), f"separator {separator}"
    elif texts and all(_is_framed(value.written) for value in texts):
        split, way = _list_items, "list"
    else:
        split, way = _choose_split(texts, known, like)
    cells = [_cells(value, split) for value in values]
    if _is_vector(values, cells, known, like):
        return Reading(cells, True, "vector")
    return Reading(cells, False, way)


def _cells(value: Value, split: Callable[[str], Cells]) -> Cells:
    written = value.written
    if written is None or (isinstance(written, str) and not written.strip()):
        return ()
    if isinstance(written, str):
        try:
            return split(written)
        except ValueError as error:
            raise value.wrong(str(error)) from None
    return written if isinstance(written, tuple) else (written,)


def _splitter(separator: str) -> Callable[[str], Cells]:
    def split(text: str) -> Cells:
        return tuple(part.strip() for part in text.split(separator) if part.strip())

    return split


def _whole(text: str) -> Cells:
    return (text,)


def _is_framed(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and _FRAMES.get(inner[0]) == inner[-1]


def _list_items(text: str) -> Cells:
    """The items of a list as text: of Python, JSON, YAML, or as NumPy prints it, without commas."""
    inner = text.strip()[1:-1].strip()
    if not inner:
        return ()
    if _SPACED_BITS.fullmatch(" ".join(inner.split())):
        return tuple(inner.split())
    items: list[str] = []
    at = 0
    while at < len(inner):
        found = _ITEM.match(inner, at)
        if not found or found.end() == at:
            raise ValueError('not a list that can be read; write it as JSON, as in `["a", "b"]`')
        items.append(found[3].strip() if found[3] is not None else _unescaped(found[1] or found[2] or ""))
        at = found.end()
    return tuple(item for item in items if item)


def _unescaped(text: str) -> str:
    return re.sub(r"\\u([0-9a-fA-F]{4})|\\(.)", lambda m: chr(int(m[1], 16)) if m[1] else m[2], text)


def _choose_split(texts: Sequence[Value], known: KnownLabels | None, like: str) -> tuple[Callable[[str], Cells], str]:
    _refuse_mixed(texts)
    found = [mark for mark in SEPARATORS if any(mark in value.written for value in texts)]
    if not found:
        if _are_bits(texts, _SPACED_BITS):
            return _splitter(" "), "separator  "
        return _check_joined(texts, known), "whole"
    ways: dict[str, Callable[[str], Cells]] = {"whole": _whole} | {
        f"separator {mark}": _splitter(mark) for mark in found
    }
    if known is not None:
        fitting = [way for way, split in ways.items() if _are_known(texts, split, known)]
        if len(fitting) > 1:
            fitting = [like] if like in fitting else fitting
        if len(fitting) == 1:
            return ways[fitting[0]], fitting[0]
        if not fitting and len(found) == 1:
            return ways[f"separator {found[0]}"], f"separator {found[0]}"
    elif len(found) == 1 and (found[0] != "," or _has_shared_parts(texts)):
        return ways[f"separator {found[0]}"], f"separator {found[0]}"
    raise _two_readings(texts, found)


def _refuse_mixed(texts: Sequence[Value]) -> None:
    framed = next((value for value in texts if _is_framed(value.written)), None)
    plain = next((value for value in texts if not _is_framed(value.written)), None)
    if framed and plain:
        raise plain.wrong(
            f"not a list, but line {framed.line} has one ({shorten(framed.written)}); write all in one way, "
            "or give label_separator"
        )


def _are_bits(texts: Sequence[Value], pattern: re.Pattern[str]) -> bool:
    return bool(texts) and all(pattern.fullmatch(value.written.strip()) for value in texts)


def _check_joined(texts: Sequence[Value], known: KnownLabels | None) -> Callable[[str], Cells]:
    """Raises DataError for a column such as `010`, `110`, whose zeros and ones may be classes or a name."""
    sizes = {len(value.written.strip()) for value in texts}
    if known is None and len(sizes) == 1 and _are_bits(texts, _JOINED_BITS):
        zero = next((value for value in texts if value.written.strip().startswith("0")), None)
        if zero is not None:
            raise zero.wrong(
                f"a 0 or 1 for each of {sizes.pop()} classes, or one class of that name; "
                "write `0,1,0` for the first, list the names in labels for the second"
            )
    return _whole


def _are_known(texts: Sequence[Value], split: Callable[[str], Cells], known: KnownLabels) -> bool:
    return all(known.find(part.strip()) is not None for value in texts for part in split(value.written))


def _has_shared_parts(texts: Sequence[Value]) -> bool:
    """Whether the parts between commas recur in several values; those of names such as `Food, Drink` do not."""
    split = _splitter(",")
    counts = Counter(key for value in texts for key in {canonical_key(part) for part in split(value.written)})
    return any(count > 1 for count in counts.values())


def _two_readings(texts: Sequence[Value], found: Sequence[str]) -> DataError:
    value = next(value for value in texts if any(mark in value.written for mark in found))
    parts = [
        f"{_parts(value.written, mark)} (label_separator `{shorten(mark)}`)" for mark in found if mark in value.written
    ]
    others = [mark for mark in found if mark not in value.written]
    more = f"; other labels have {' and '.join(f'`{shorten(mark)}`' for mark in others)}" if others else ""
    one = f"one label ({shorten(value.written)})"
    return value.wrong(
        f"it may be {', or '.join([*parts, one])}{more}; give label_separator, or list the classes in labels"
    )


def _parts(text: str, mark: str) -> str:
    parts = [part.strip() for part in text.split(mark) if part.strip()]
    return f"{len(parts)} labels ({' and '.join(shorten(part) for part in parts[:3])}{' …' * (len(parts) > 3)})"


def _is_vector(values: Sequence[Value], cells: Sequence[Cells], known: KnownLabels | None, like: str) -> bool:
    """Whether all cells are zeros and ones that mark classes by position, and not classes called 0 and 1."""
    filled = [(value, each) for value, each in zip(values, cells, strict=True) if each]
    if not filled or any(as_bit(cell) is None for _, each in filled for cell in each):
        return False
    first, size = filled[0][0], len(filled[0][1])
    is_doubled = any(len({as_bit(cell) for cell in each}) < len(each) for _, each in filled)
    other = next((value for value, each in filled if len(each) != size), None)
    if is_doubled and other:
        raise other.wrong(
            f"zeros and ones for classes by place, but not as many as in line {first.line}; give all alike"
        )
    if other or is_doubled or like == "vector":
        return not other
    return _short_vector(values, cells, known)


def _short_vector(values: Sequence[Value], cells: Sequence[Cells], known: KnownLabels | None) -> bool:
    """The error about a column of only [0], [1] or [0, 1], [1, 0], which fit both readings."""
    size = len(next(each for each in cells if each))
    names = set(known.labels) if known is not None else set()
    if len(names) == size and any(as_bit(name) is None for name in names):
        return True
    value = next(value for value, each in zip(values, cells, strict=True) if each)
    if known is None and _may_be_places(value.written, size):
        raise value.wrong(
            f"a 0 or 1 for each of {_classes(size)} by place, or the names of classes; for the first list the "
            'classes in labels, for the second write the names in quotes, as in ["0"]'
        )
    return False


def _classes(size: int) -> str:
    return f"{size} classes" if size != 1 else "one class"


def _may_be_places(written: Any, size: int) -> bool:
    if isinstance(written, str):
        return (size > 1 or _is_framed(written)) and not {'"', "'"} & set(written)
    return isinstance(written, tuple) and not any(isinstance(cell, str) for cell in written)
