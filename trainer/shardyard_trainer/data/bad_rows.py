"""What of a source is not used: rows, refused or skipped up to the share that it allows, and columns nothing reads."""

from __future__ import annotations

from collections import Counter
from typing import NoReturn

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError, listed

REASON = "BAD_ROWS_LEFT_OUT"
UNREAD = "DATA_NOT_READ"
_MOST_LISTED = 5
_MOST_UNREAD = 256
"""Names of what is not read that are counted at most: each row may have others."""

_ROUNDING = 1e-9


class BadRows:
    """The bad rows of one reading of a source; without a share, the first one is raised.

    `places` are their (file, line). It also counts what of the used rows is not read.
    """

    def __init__(self, source: spec_pb2.DataSource) -> None:
        self._share = source.max_bad_rows_share
        self._first: list[DataError] = []
        self.places: set[tuple[str, int]] = set()
        self._unread: Counter[str] = Counter()

    def skip(self, error: DataError) -> None:
        """Leaves out the row that an error names. Raises the error if it names none, or if all rows are needed."""
        if not error.line:
            raise error
        self.skip_file(error)

    def skip_file(self, error: DataError) -> None:
        """Leaves out a file that is a row by itself, or the row that the error names. Raises it if all are needed."""
        if not self._share:
            raise error
        if len(self._first) < _MOST_LISTED:
            self._first.append(error)
        self.places.add((error.file, error.line))

    def first_of(self, file: str) -> DataError | None:
        """The message of a file's first bad row, if that row is among those listed."""
        return next((error for error in self._first if error.file == file), None)

    def finish(self, num_good: int, field: str) -> None:
        """Raises DataError if the bad rows are more than the allowed share of all, `num_good` included."""
        total = num_good + len(self.places)
        # 0.29 · 100 is less than 29 in floating point: exactly the share is allowed.
        if len(self.places) > self._share * total * (1 + _ROUNDING):
            message = (
                f"{self._counted(total)}, more than the {self._share:.3g} of max_bad_rows_share: {self._listed()}; "
                "fix them, or allow a larger share"
            )
            first = self._first[0]
            raise DataError(message, field=field, column=first.column, value=first.value)

    def pass_over(self, what: str, num_rows: int = 1) -> None:
        """Counts rows with something that nothing reads, such as `column 'id'`."""
        if what in self._unread or len(self._unread) < _MOST_UNREAD:
            self._unread[what] += num_rows

    def unread(self) -> str:
        """The warning about what is not read; empty if all is."""
        if not self._unread:
            return ""
        named = [f"{what} ({number:,} {'row' if number == 1 else 'rows'})" for what, number in self._unread.items()]
        return (
            f"not read: {listed(named)}; map a column that matters, and put what else matters into texts that are read"
        )

    def note(self, num_good: int) -> str:
        """The warning about skipped rows; empty if all rows are used."""
        if not self.places:
            return ""
        return f"{self._counted(num_good + len(self.places))} and are left out: {self._listed()}"

    def _counted(self, total: int) -> str:
        return f"{len(self.places):,} of {total:,} rows cannot be used"

    def _listed(self) -> str:
        more = len(self.places) - len(self._first)
        listed = "; ".join(each.message for each in sorted(self._first, key=_place))
        return f"{listed}; and {more:,} more" if more else listed


def _place(error: DataError) -> tuple[str, int]:
    return error.file, error.line


def refuse(error: DataError) -> NoReturn:
    """Stands in for `BadRows.skip` if no row may be skipped: raises the row's error."""
    raise error
