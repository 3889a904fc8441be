"""Who had which item when: rows with `user`, `item`, and a `time` and `rating` if there are such columns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import shorten
from shardyard_trainer.data.records import Record, Role, read_as
from shardyard_trainer.data.sources import DataFile

LONGEST_ID = 256
# Column names of MovieLens, Amazon, Yelp, Goodreads, and of session and shop data; matched in any case.
_USER = Role(
    "user",
    (
        *(
            "user_id",
            "userid",
            "uid",
            "reviewerid",
            "session_id",
            "sessionid",
            "visitorid",
            "visitor_id",
            "customer_id",
        ),
        *("userId", "reviewerID", "UserId", "SessionId"),
    ),
)
_ITEM = Role(
    "item",
    (
        *("item_id", "itemid", "iid", "movie_id", "movieid", "product_id", "productid", "asin", "parent_asin"),
        *("business_id", "book_id", "article_id", "itemId", "movieId", "ItemId", "productId"),
    ),
)
_TIME = Role(
    "time",
    (
        *("timestamp", "date", "datetime", "created_at", "unixreviewtime", "event_time", "date_added", "ts"),
        *("t_dat", "unixReviewTime"),
    ),
    is_optional=True,
    is_time=True,
)
_RATING = Role("rating", ("ratings", "stars", "overall"))

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_UNITS = (
    (1e8, 1e10, "seconds"),
    (1e11, 1e13, "milliseconds"),
    (1e14, 1e16, "microseconds"),
    (1e17, 1e19, "nanoseconds"),
)
"""Ranges of times since 1970, from 1973 on, by unit: no two units share a number, so a number shows its unit."""


class Interaction(NamedTuple):
    """A user had an item. `time` is None if the source has no times, `rating` if it was not requested."""

    file: str
    line: int
    user: str
    item: str
    time: float | None
    rating: float | None


def read_interactions(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    clock: Clock,
    *,
    rated: bool,
    field: str,
    bad: BadRows | None = None,
) -> Iterator[Interaction]:
    """The rows of all files, in order; `rated`: each with its rating. Raises DataError.

    A text file is read as lines `user item`. All sources of a job are read with one `clock`. Rows that cannot be read
    go to `bad`, if the caller has one and finishes it.
    """
    layout = (_USER, _ITEM, _TIME, *((_RATING,) if rated else ()))
    named = [_as_interactions(file) for file in files]
    yield from read_as(partial(_interaction, clock=clock), named, source, (layout,), field=field, bad=bad)


def _as_interactions(file: DataFile) -> DataFile:
    is_text = file.format == spec_pb2.DATA_FORMAT_TEXT
    return replace(file, format=spec_pb2.DATA_FORMAT_INTERACTIONS) if is_text else file


def _interaction(record: Record, clock: Clock) -> Interaction:
    cells = record.cells
    return Interaction(
        record.file,
        record.line,
        _identity(cells["user"], "user"),
        _identity(cells["item"], "item"),
        clock.read(cells.get("time"), has_one="time" in cells),
        _rating(cells["rating"]) if "rating" in cells else None,
    )


def _identity(cell: Any, role: str) -> str:
    """An id as text; a number of JSON or Parquet must be whole, and has no decimal point. Raises ValueError."""
    if isinstance(cell, str):
        found = cell.strip()
    elif isinstance(cell, bool) or not isinstance(cell, int | float):
        found = ""
        if cell is not None:
            one_row = "; write a row for each interaction" if isinstance(cell, list | dict) else ""
            raise ValueError(f"the {role} is {shorten(str(cell))!r}; give a text or a number{one_row}")
    elif isinstance(cell, float) and not cell.is_integer():
        raise ValueError(f"the {role} is {cell!r}; give a text or a whole number")
    else:
        found = str(int(cell))
    if not found:
        raise ValueError(f"the {role} is missing; fill it in, or remove the row")
    if len(found) > LONGEST_ID:
        raise ValueError(f"the {role} {shorten(found)!r} has {len(found):,} characters; at most {LONGEST_ID}")
    if not found.isprintable():
        raise ValueError(f"the {role} {shorten(found)!r} has an unprintable character; remove it")
    return found


def _rating(cell: Any) -> float:
    found = _number(cell)
    if found is None:
        raise ValueError(f"the rating is {_shown(cell)}; give a number, or leave min_rating out")
    return found


class Clock:
    """Reads the times of all interactions of a job and requires one unit: a single number may not show its own."""

    def __init__(self) -> None:
        self._has_times: bool | None = None
        self._way = self._first = ""

    @property
    def has_times(self) -> bool:
        """Whether the rows read so far have times."""
        return bool(self._has_times)

    def read(self, cell: Any, *, has_one: bool) -> float | None:
        """A time as a number that grows. Raises ValueError if it is not a time, or in another unit than before."""
        if self._has_times is None:
            self._has_times = has_one
        if has_one != self._has_times:
            some, others = ("have", "has none") if self._has_times else ("have no", "has one")
            raise ValueError(f"the rows before {some} times, but this file {others}; give each file a time, or none")
        if not has_one:
            return None
        number = _number(cell)
        found, way = (number, _unit(number)) if number is not None else (_date(cell), "dates")
        self._compare(way, _shown(cell))
        return found

    def _compare(self, way: str, shown: str) -> None:
        if not self._way:
            self._way, self._first = way, shown
        elif way != self._way:
            # A 0 among seconds is a missing time; milliseconds among seconds would all sort last.
            raise ValueError(
                f"the time {shown} is {_described(way)}, but {self._first} in an earlier row is "
                f"{_described(self._way)}; write all of them alike"
            )


def _described(way: str) -> str:
    return f"in {way} since 1970" if way.endswith("seconds") else "a date" if way == "dates" else "another number"


def _unit(number: float) -> str:
    return next((name for low, high, name in _UNITS if low <= number < high), "numbers")


def _number(cell: Any) -> float | None:
    """The cell as a finite number; None if it is not one."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    if isinstance(cell, str) and not _NUMBER.fullmatch(cell.strip()):
        return None
    found = float(cell)
    return found if math.isfinite(found) else None


def _date(cell: Any) -> float:
    """Seconds since 1970 of a date, read as UTC if it has no time zone. Raises ValueError."""
    if isinstance(cell, str) and cell.strip():
        try:
            found = datetime.fromisoformat(cell.strip().removesuffix(" UTC"))
        except ValueError:
            pass
        else:
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    raise ValueError(f"the time is {_shown(cell)}; write it as a number, or as 2026-01-31 or 2026-01-31T18:30:00Z")


def _shown(cell: Any) -> str:
    return "missing" if cell is None or cell == "" else repr(shorten(str(cell)))
