"""Parses labels (one class, several, or a number) and rejects anything else with file and line."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.columns import Row
from shardyard_trainer.data.errors import DataError, SpecError, listed, nearest, shorten

Problem: TypeAlias = "spec_pb2.TextClassification.Problem.ValueType"
SINGLE_LABEL = spec_pb2.TextClassification.PROBLEM_SINGLE_LABEL
MULTI_LABEL = spec_pb2.TextClassification.PROBLEM_MULTI_LABEL
REGRESSION = spec_pb2.TextClassification.PROBLEM_REGRESSION

LABELS_FIELD = "spec.fine_tuning.text_classification.labels"
"""The field named in errors about labels given in the spec."""

MOST_LABELS = 10_000
_LONGEST_LABEL = 1024
_MOST_LABELS_BYTES = 192 * 1024
"""Bytes of all labels found at most: they go into the resolved spec, which must stay under 256 KiB."""

_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp"})
"""Unicode categories of invisible characters and of those that control terminals or text direction."""

_JOINERS = "\u200c\u200d"
"""Invisible as well, but needed for Persian words and some emoji."""

_INTEGER = re.compile(r"-?[0-9]+")
_LARGEST_NUMBER = math.sqrt(3.4028234663852886e38)
"""The square of a larger number is infinite in fp32, and so would the loss be."""

_MISSING = "the label is missing; fill it in, or remove the row"
_NO_VALUE = frozenset({"nan", "<na>"})
"""What pandas writes for a missing value; a class of this name must be listed in the spec."""


@dataclass(frozen=True)
class LabelSchema:
    """The problem, and the classes in the order of their outputs (none for regression)."""

    problem: Problem
    labels: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """The head's outputs: one for each label, or one for a regression."""
        return max(1, len(self.labels))


def class_name(row: Row, given: Collection[str] = ()) -> str:
    """The class that a row's label names; `given` are the spec's labels. Raises DataError with its line."""
    name = _class_name(row)
    rule = unfit(name)
    # Labels of the spec were checked by their own rules, and a spec may name a class `nan`.
    if rule and name not in given:
        raise wrong_label(row, rule)
    return name


def find_schema(problem: Problem, given: Sequence[str], seen: set[str]) -> LabelSchema:
    """The schema from the spec's labels, or from those of the training data, sorted (as numbers if all are)."""
    if problem == REGRESSION:
        if given:
            raise SpecError(LABELS_FIELD, "SPEC_INVALID", "labels are given, but a regression has none; leave them out")
        return LabelSchema(problem, ())
    if given:
        check_labels(given, problem)
        return LabelSchema(problem, tuple(given))
    check_amount(
        seen,
        "if it is a quantity, set problem to regression",
        "shorten them, or map the column that holds classes in columns.label",
    )
    if problem == SINGLE_LABEL and len(seen) < 2:
        raise DataError(
            f"the data has one label: {listed(sorted(seen))}; a classifier needs at least 2; give data with more, or "
            "list them in labels"
        )
    if not seen:
        raise DataError("no row has a label; map the column with labels in columns.label")
    return LabelSchema(problem, tuple(sorted(seen, key=_sort_key(seen))))


def check_amount(seen: Collection[str], if_many: str, if_long: str) -> None:
    """Raises DataError with the given next step if the labels are too many or too long for a resolved spec."""
    if len(seen) > MOST_LABELS:
        raise DataError(f"{len(seen):,} different labels; at most {MOST_LABELS:,}; {if_many}")
    if (size := spec_pb2.TextClassification(labels=seen).ByteSize()) > _MOST_LABELS_BYTES:
        message = f"the {len(seen):,} different labels have {size:,} bytes together; at most {_MOST_LABELS_BYTES:,}"
        raise DataError(f"{message}; {if_long}")


def check_labels(given: Sequence[str], problem: Problem) -> None:
    """Raises SpecError for given labels that are doubled, empty, unreadable or too few."""
    doubled = sorted(label for label, times in Counter(given).items() if times > 1)
    if doubled:
        raise SpecError(LABELS_FIELD, "SPEC_INVALID", f"duplicate label: {listed(doubled)}; leave one out")
    for at, label in enumerate(given):
        rule = "it is empty; fill it in" if not label.strip() else _unreadable(label)
        if rule:
            raise SpecError(f"{LABELS_FIELD}[{at}]", "SPEC_INVALID", f"{shorten(label)!r}: {rule}")
    if len(given) < 2 and problem != MULTI_LABEL:
        raise SpecError(LABELS_FIELD, "SPEC_INVALID", f"one label ({shorten(given[0])}); a classifier needs at least 2")


def unknown_label(schema: LabelSchema, label: str, file: str, line: int) -> DataError:
    """The error for a label that the schema does not have."""
    return DataError(
        f"the label {shorten(label)!r} is none of: {listed(schema.labels)}{nearest(label, schema.labels)}"
        "; write one of these, or add it to labels",
        file=file,
        line=line,
        value=label,
    )


def _sort_key(seen: set[str]) -> Any:
    integers = all(_INTEGER.fullmatch(label) for label in seen)
    return (lambda label: (int(label), label)) if integers else str


def unfit(name: str) -> str:
    """The rule that a class name breaks; empty if it is valid."""
    if name.casefold() in _NO_VALUE:
        return _MISSING
    return _unreadable(name)


def _unreadable(name: str) -> str:
    if len(name) > _LONGEST_LABEL:
        return f"it has {len(name):,} characters; at most {_LONGEST_LABEL:,}; shorten it"
    for character in name:
        category = unicodedata.category(character)
        if category == "Cs":
            return "it has half of a surrogate pair; write the whole character"
        if category in _UNSEEN and character not in _JOINERS:
            return f"it has the control character U+{ord(character):04X}; leave it out"
    return ""


def _class_name(row: Row) -> str:
    label = row.label
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):
        if math.isfinite(label) and label.is_integer():
            return str(int(label))
        raise wrong_label(row, "a class is a word or a whole number; for scores set problem to regression")
    if isinstance(label, int):
        return str(label)
    if label is None or label == "":
        raise wrong_label(row, _MISSING)
    if isinstance(label, list | tuple):
        raise wrong_label(row, "a class is a word or a number; for several classes set problem to multi_label")
    if not isinstance(label, str) or not label.strip():
        raise wrong_label(row, "a class is a word or a number; write one, or remove the row")
    return label.strip()


def number_of(value: Any) -> float:
    """A number, or text that is one; NaN for anything else, and for what is not finite."""
    try:
        is_odd = isinstance(value, str) and "_" in value
        found = math.nan if isinstance(value, bool) or is_odd else float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def number(row: Row) -> float:
    """A row's label as a number, for a regression. Raises DataError with its line."""
    value = number_of(row.label)
    if math.isnan(value):
        advice = number_advice(row.label, otherwise="; for classes set problem to single_label")
        raise wrong_label(row, f"a regression needs a finite number; {advice}")
    if abs(value) > _LARGEST_NUMBER:
        raise wrong_label(
            row, f"its square is not finite in fp32; a regression needs numbers up to {_LARGEST_NUMBER:.1e}: scale them"
        )
    return value


def number_advice(label: Any, *, otherwise: str = "") -> str:
    """The next step for a value that is not a number; `otherwise` is added if nothing better is known."""
    text = unicodedata.normalize("NFKC", label).strip() if isinstance(label, str) else ""
    if label is None or (isinstance(label, str) and (not text or text.casefold() in _NO_VALUE)):
        return "fill it in, or remove the row"
    fraction = unicodedata.numeric(label.strip(), None) if isinstance(label, str) and len(label.strip()) == 1 else None
    if meant := f"{fraction:g}" if fraction is not None else _meant_number(text):
        return f"write it as {meant}, with a point before the decimals and nothing else"
    if re.search(r"inf(inity)?", text.casefold()):
        return "an infinite score cannot be learned: remove the row, or give a number"
    return f"write digits with a point before the decimals, as in -1.5{otherwise}"


def _meant_number(text: str) -> str:
    """The likely meaning of a number in another notation, as it should be written; empty if unclear."""
    plain = re.sub(r"[\s_'\u2019]", "", text.replace("\u2212", "-"))
    if re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})*,\d+|[+-]?\d+,\d+", plain):
        # `1,5` and `1.000,5`; a comma before exactly three digits may separate thousands.
        return "" if re.fullmatch(r"[+-]?\d{1,3},\d{3}", plain) else plain.replace(".", "").replace(",", ".")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        return plain.replace(",", "")
    return plain if re.fullmatch(r"[+-]?\d+(\.\d+)?", plain) else ""


def wrong_label(row: Row, rule: str) -> DataError:
    """A DataError about a row's label, with its file and line."""
    return DataError(f"label {shorten(str(row.label))!r}: {rule}", file=row.file, line=row.line, value=str(row.label))
