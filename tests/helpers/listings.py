"""Which folders this process lists while something runs, from the audit events of Python itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_recorders: list[list[str]] = []
_hooked: list[bool] = []


@contextmanager
def folders_listed() -> Iterator[list[str]]:
    """The absolute paths of the folders that are listed inside the block, in order, one for each listing."""
    if not _hooked:
        # A hook stays until the process ends: one for all tests.
        sys.addaudithook(_note)
        _hooked.append(True)
    seen: list[str] = []
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders.remove(seen)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _recorders and event in {"os.listdir", "os.scandir"} and isinstance(arguments[0], str | os.PathLike):
        for seen in _recorders:
            seen.append(str(Path(arguments[0]).absolute()))
