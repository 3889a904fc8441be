"""What is wrong with a spec, its model or its data, in words for the person who wrote it.

SpecError            a field of the spec breaks a rule
└── DataError        a data file cannot be used: file, line, column and value are named
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

_LONGEST_VALUE = 80
_MOST_COMPARED = 10_000


class SpecError(Exception):
    """A field of the spec breaks a rule.

    `field` is the path from the Job on, such as `spec.train_data.columns.label`; `reason` such as `SPEC_INVALID`;
    `message` names the value, the rule and the next step; `metadata` has the same as data. `others` are further errors
    that were found in the same look.
    """

    def __init__(
        self,
        field: str,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        *,
        others: Sequence[SpecError] = (),
    ) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.others = tuple(others)

    def all(self) -> list[SpecError]:
        """This error and all others found together with it."""
        return [self, *(found for other in self.others for found in other.all())]


class DataError(SpecError):
    """A data file cannot be used. Lines count from 1; 0 and empty strings mean that there is none to name."""

    def __init__(
        self,
        message: str,
        *,
        file: str = "",
        line: int = 0,
        column: str = "",
        value: str = "",
        field: str = "spec.train_data",
        reason: str = "DATA_INVALID",
    ) -> None:
        place = ", ".join([*([file] if file else []), *([f"line {line}"] if line else [])])
        metadata = {"file": file, "line": str(line) if line else "", "column": column, "value": shorten(value)}
        super().__init__(
            field, reason, f"{place}: {message}" if place else message, {k: v for k, v in metadata.items() if v}
        )
        self.plain = message
        self.file = file
        self.line = line
        self.column = column
        self.value = value

    def at(self, field: str) -> DataError:
        """The same error for another field; the errors found with it are kept."""
        made = DataError(
            self.plain,
            file=self.file,
            line=self.line,
            column=self.column,
            value=self.value,
            field=field,
            reason=self.reason,
        )
        made.others = self.others
        return made


def raise_all(errors: Iterable[SpecError]) -> None:
    """Raises the first error with the others in it; returns if there are none."""
    found = list(errors)
    if found:
        first = found[0]
        first.others = (*first.others, *found[1:])
        raise first


def shorten(value: str, most: int = _LONGEST_VALUE) -> str:
    """The value as it is quoted in a message: at most 80 characters, or `most`, nothing unprintable."""
    printable = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in value[:most])
    return printable + ("…" if len(value) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` if a known name is close, else an empty string; of many names only the first are compared."""
    close = difflib.get_close_matches(name, list(islice(known, _MOST_COMPARED)), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for a message: the first few, then how many more there are."""
    every = list(names)
    shown = ", ".join(shorten(name) for name in every[:most])
    return f"{shown} and {len(every) - most} more" if len(every) > most else shown
