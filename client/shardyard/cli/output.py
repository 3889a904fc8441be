"""What commands print: tables and lines for people, JSON for programs, and errors as both.

With `--json` stdout holds one JSON document, or JSON lines if there is a stream; an error is `{"error": {…}}` there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from shardyard._lines import printable
from shardyard.errors import JobError, ShardyardError, Unavailable


def print_json(data: Any) -> None:
    """Prints one JSON document, indented."""
    print(json.dumps(data, indent=2, ensure_ascii=False), flush=True)


def print_json_line(data: Any) -> None:
    """Prints one JSON document in one line."""
    print(json.dumps(data, ensure_ascii=False), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """A table without frames, or the sentence `empty`."""
    from rich.console import Console  # Imported here: programs that ask for JSON do not wait for it.
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if not table.row_count:
        print(empty)
        return
    wide = None if sys.stdout.isatty() else 200  # A pipe has no width: lines are not to be folded at 80.
    console = Console(highlight=False, width=wide)
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():  # Every cell is filled up to its column's width, the last one too.
        print(line.rstrip())


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one per line, without those that have no value."""
    for name, value in pairs:
        if value:
            print(f"{name:<12} {printable(value)}")


def print_error(error: ShardyardError, *, as_json: bool) -> None:
    """Print an error: each violation on its own line, then what to do."""
    if as_json:
        print_json_line({"error": error.to_dict()})
        return
    if error.violations:
        count = len(error.violations)
        print(f"error: {error.reason}: {count} thing{'s' if count > 1 else ''} to correct", file=sys.stderr)
        for violation in error.violations:
            print(f"  {printable(str(violation))}", file=sys.stderr)
        return
    reason = f"{error.reason}: " if error.reason and error.reason not in error.message else ""
    print(f"error: {printable(reason + error.message)}", file=sys.stderr)
    if isinstance(error, JobError) and error.info.failure is not None and error.info.failure.log_tail:
        print("the last lines of the failing rank:", file=sys.stderr)
        for line in error.info.failure.log_tail.splitlines():
            print(f"  {printable(line)}", file=sys.stderr)
    if error.retry_after is not None and not isinstance(error, Unavailable):
        print(f"try again after {error.retry_after:.0f} s", file=sys.stderr)
